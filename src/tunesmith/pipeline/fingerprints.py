"""SHA-256 of many files, with progress: what manifests and lineage record, and what a check holds against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.base import Progress

Fingerprint = dict[str, Any]
"""Of one file: `bytes`, and `sha256` in hexadecimal."""

BLOCK = 1 << 22


def fingerprints(directory: Path, names: Iterable[str], label: str, progress: Progress) -> dict[str, Fingerprint]:
    """Size and hash of files.

    Args:
        names: paths below ``directory``, with `/` between their parts.
        label: what the progress is called; it counts bytes.

    Raises:
        OSError: when a file cannot be read.
    """
    sizes = {name: (directory / name).stat().st_size for name in names}
    total, done, found = sum(sizes.values()), 0, dict[str, Fingerprint]()
    for name in sizes:
        digest, count = sha256(), 0
        with open(directory / name, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                count += len(block)
                progress(label, done + count, total)
        done += count
        found[name] = {"bytes": count, "sha256": digest.hexdigest()}
    return found


def differences(directory: Path, expected: Mapping[str, Fingerprint], label: str, progress: Progress) -> list[str]:
    """What became of files since their fingerprints were taken, a phrase each; empty when nothing did.

    A file of another size is not read: its hash cannot be the same.
    """
    said, same_size = dict[str, str](), list[str]()
    for name, before in expected.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            said[name] = f"{name} is missing"
            continue
        if size != before["bytes"]:
            said[name] = f"{name} has changed ({size:,} bytes, {before['bytes']:,} expected)"
        else:
            same_size.append(name)
    for name in same_size:
        try:
            now = fingerprints(directory, [name], label, progress)[name]
        except OSError as error:
            said[name] = f"{name} cannot be read: {error.strerror}"
        else:
            if now["sha256"] != expected[name]["sha256"]:
                said[name] = f"{name} has changed"
    return [said[name] for name in expected if name in said]
