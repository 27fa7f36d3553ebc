"""Versions and machine, as a run records them."""

from __future__ import annotations

import os
import platform
import sys
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tunesmith.plan.hardware import detect_hardware, native_dtypes

PACKAGES = (
    "tunesmith", "torch", "transformers", "peft", "trl", "datasets", "safetensors", "tokenizers", "huggingface-hub",
    "bitsandbytes", "sacrebleu", "rouge-score", "pydantic",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Versions of what matters to a result; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@lru_cache(maxsize=1)
def code_sha256() -> str:
    """Hash of Tunesmith's own source files."""
    package = Path(__file__).parents[1]
    digest = sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def describe_environment() -> dict[str, Any]:
    import torch

    hardware = detect_hardware()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "device": str(hardware.device),
        "device_name": hardware.name,
        "dtypes": sorted(native_dtypes(hardware.device)),
        "memory_bytes": hardware.memory_bytes,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": hardware.processes,
        "command": [os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]],
    }
