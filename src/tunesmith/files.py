"""Files are written beside, synced and renamed, so that nothing half-written ever bears a final name."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

ASIDE = ".partial"
"""Suffix of everything that is not committed yet; safe to delete when no run is alive."""

OLD = ".old"
"""Put before it for a directory that was moved away for its successor."""


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8) in one step: readers see the old file or the new one, never a part."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Replaces ``path`` by ``lines``, which bring their own ends, in one step; returns how many there were."""
    aside, count = path.with_name(f"{path.name}{ASIDE}{os.getpid()}"), 0
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return count


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON; NaN and infinity are refused, because JSON does not have them."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Adds ``value`` as one line and waits until it is on the disk; what a killed process left of a line is dropped."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that `append_json` writes, without a last line that was cut off; none where it is missing.

    Raises:
        ValueError: a whole line is no JSON.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in whole if line.strip()]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def committed_directory(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``final`` and renames it to ``final`` when the block ends well.

    An existing ``final`` is moved away first and deleted only after the new one stands. When the block raises,
    nothing new is left behind and the old directory stays as it was. What a killed process leaves, `recovered` mends.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with _synced_aside(final) as aside:
        yield aside
    if final.exists():
        old = final.with_name(f"{final.name}{OLD}{ASIDE}{os.getpid()}")
        os.replace(final, old)
        os.replace(aside, final)
        shutil.rmtree(old)
    else:
        os.replace(aside, final)
    sync_directory(final.parent)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``final`` and renames it to ``final``, which may not exist unless it is empty.

    Raises:
        FileExistsError: when ``final`` holds something by then; it stays as it is.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, f"{error.filename} is a file, not a directory") from error
    for left in final.parent.glob(f"{glob.escape(final.name)}{ASIDE}*"):
        process = left.name.rpartition(ASIDE)[2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    with _synced_aside(final) as aside:
        yield aside
    try:
        if final.is_dir():
            final.rmdir()  # fails unless it is empty
        os.rename(aside, final)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, error.strerror, str(final)) from error
        raise
    sync_directory(final.parent)


@contextmanager
def _synced_aside(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside ``final``, whose files are on the disk when the block has ended well."""
    aside = final.with_name(f"{final.name}{ASIDE}{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                sync_file(path)
        sync_directory(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def recovered(directory: Path) -> None:
    """Puts back what a killed process had moved away, and removes what it had not committed.

    To be called only by whoever holds the directory for itself.
    """
    for path in sorted(directory.glob(f"*{ASIDE}*")):
        name, _, _ = path.name.partition(ASIDE)
        final = path.with_name(name.removesuffix(OLD))
        if name.endswith(OLD) and not final.exists():
            os.replace(path, final)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_directory(path: Path) -> None:
    """Deletes a directory such that nothing half-deleted ever bears its name."""
    aside = path.with_name(f"{path.name}{ASIDE}{os.getpid()}")
    os.replace(path, aside)
    shutil.rmtree(aside)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes a rename durable. Windows cannot open a directory for that, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BytesAt:
    """A file that stays open and is read at any place, from several threads too."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as this object)

    def read(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), length, offset)
        self._file.seek(offset)
        return self._file.read(length)


def file_sha256(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def let_go_of_pages(address: int, length: int) -> None:
    """Takes pages that are mapped from a file, shared or only read, out of the process's memory (Linux).

    They are mapped again when they are touched. Elsewhere nothing happens.
    """
    dont_need = 4  # MADV_DONTNEED of mman.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.madvise(address, length, dont_need)
