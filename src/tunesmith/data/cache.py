"""Where rows and their tokens are kept on disk, found again by what they were made from."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from tunesmith.base import InputError
from tunesmith.files import ASIDE, committed_directory
from tunesmith.models.demo import cache_directory

KEPT_BYTES = 20 * 2**30
"""When the cache grows over this, entries that were not used for a day go, the oldest first."""

UNTOUCHED_SECONDS = 24 * 3600


def data_cache() -> Path:
    """`$TUNESMITH_DATA_CACHE`, or `data` in Tunesmith's cache."""
    named = os.environ.get("TUNESMITH_DATA_CACHE")
    return Path(named).expanduser() if named else cache_directory() / "data"


def cached(made_from: Any, build: Callable[[Path], None]) -> Path:
    """The directory that ``build`` fills, made once for everything that ``made_from`` describes.

    Several processes that ask for the same entry wait for the one that makes it.

    Args:
        made_from: JSON values that determine the content; the code that makes it is added.
        build: fills an empty directory; when it raises, nothing is left.

    Raises:
        InputError: when the cache cannot be written.
    """
    entry = entry_of(made_from)
    root = entry.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{entry.name}.lock"):
            if not entry.is_dir():
                with committed_directory(entry) as directory, _rare_collections():
                    build(directory)
                forget_unused(root)
            os.utime(entry)
    except OSError as error:
        raise InputError(
            f"rows cannot be kept on disk: {error.strerror or error}",
            where=root,
            fix="make room there, or set TUNESMITH_DATA_CACHE to a directory on a disk that has some",
        ) from error
    return entry


def entry_of(made_from: Any) -> Path:
    """Where that entry is, or would be."""
    text = json.dumps([made_from, _code(), version("transformers"), version("tokenizers")], sort_keys=True)
    return data_cache() / sha256(text.encode()).hexdigest()[:32]


def forget_unused(root: Path) -> None:
    """Deletes entries that were not used for a day, the oldest first, until the rest is within the limit."""
    entries = sorted(filter(None, (_measured(path) for path in root.iterdir() if path.is_dir())))
    total = sum(size for _, _, size in entries)
    for used, path, size in entries:
        old = time.time() - used > UNTOUCHED_SECONDS
        if old and (total > KEPT_BYTES or ASIDE in path.name):
            shutil.rmtree(path, ignore_errors=True)
            (root / f"{path.name}.lock").unlink(missing_ok=True)
            total -= size


def _measured(path: Path) -> tuple[float, Path, int] | None:
    """When an entry was last used, and its bytes; None when another process has just renamed or removed it."""
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_mtime, path, size
    except FileNotFoundError:
        return None


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Lets the garbage collector look at a build's millions of short-lived lists less often: a third of its time."""
    before = gc.get_threshold()
    gc.set_threshold(500_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the modules that decide what rows and tokens are: another version of them must not meet old entries."""
    package = Path(__file__).parent
    templates = [package.parent / "models" / name for name in ("sandbox.py", "templates.py")]
    files = [*sorted(package.rglob("*.py")), *templates]
    digest = sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
