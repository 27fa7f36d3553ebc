"""Which Tunesmith, and which packages beside it, a run was made with."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.pipeline.environment import PACKAGES, code_sha256

OPTIONAL = ("gguf", "zstandard", "tensorboard", "wandb")
"""Packages of the extras that a run may have used, besides those in `environment.json`."""

SECONDS_FOR_GIT = 5.0


def tunesmith_origin() -> dict[str, Any]:
    """Version and hash of Tunesmith's own sources, and where they came from.

    Returns:
        `version`; `source_sha256`; `from`, which is `index` for an installed release and `checkout` for any other
        sources; `commit` of that checkout, or None; `changed`, whether its package differs from that commit.
    """
    package = Path(tunesmith.__file__).parent
    released = package.parent.name in ("site-packages", "dist-packages") and not _from_a_url()
    return {
        "version": tunesmith.__version__,
        "source_sha256": code_sha256(),
        "from": "index" if released else "checkout",
        **({"commit": None, "changed": False} if released else _commit(package)),
    }


@cache
def dependency_versions() -> dict[str, str]:
    """Versions of everything that Tunesmith needs, directly or through others, as it is installed here.

    Requirements of extras are left out, except those in `PACKAGES` and `OPTIONAL`.
    """
    versions, waiting = dict[str, str](), [*PACKAGES, *OPTIONAL]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in versions:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        versions[name] = found.version
        for requirement in found.requires or []:
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement)):
                waiting.append(match[0])
    versions.pop("tunesmith", None)
    return dict(sorted(versions.items()))


def _from_a_url() -> bool:
    """Whether pip installed Tunesmith from a directory, archive or repository (PEP 610)."""
    try:
        return metadata.distribution("tunesmith").read_text("direct_url.json") is not None
    except metadata.PackageNotFoundError:
        return False


def _commit(package: Path) -> dict[str, Any]:
    """The commit of a checkout that tracks the package; none for a copy that merely lies inside a repository."""
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD").strip()
        return {"commit": commit, "changed": bool(_git(package, "status", "--porcelain", "--", ".").strip())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": False}


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_GIT).stdout
