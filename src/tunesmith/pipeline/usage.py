"""What a job really used: peak memory and time."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

from tunesmith.files import let_go_of_pages

OWN_PAGES = 32 * 1024
"""Bytes from which a piece of memory gets pages of its own under a memory budget."""


class PeakMemory:
    """Largest memory in use while the block runs: the device's on CUDA, this process's resident memory elsewhere."""

    def __init__(self, device: torch.device, every_seconds: float = 0.02) -> None:
        self.device = device
        self.every_seconds = every_seconds
        self.peak_bytes = 0
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._watcher is not None:
            self._watcher.join()
        self.so_far()

    def so_far(self) -> int:
        """The largest so far, in bytes."""
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        return self.peak_bytes

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            self._done.wait(self.every_seconds)


def process_peak_bytes() -> int:
    """The most resident memory that this process ever had, as the operating system counted it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # which not every system has

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_code() -> None:
    """Lets go of pages of libraries' code that were needed once, such as at their import (Linux).

    They count as the process's memory while they are mapped, torch's alone 150 MB. Those that are needed again are
    mapped again from the system's own copy of the file.
    """
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            place, rights, *_ = line.split()
            if rights == "r-xp" and ".so" in line:
                start, end = (int(side, 16) for side in place.split("-"))
                let_go_of_pages(start, end - start)


def give_back_freed() -> None:
    """Gives what has been freed back to the operating system, where the C library can be told so (glibc).

    What one phase of a job leaves behind is in pieces that do not fit the next one. After every step it would cost too
    much time, because each page is new to the process again.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory_small() -> None:
    """Lets memory go back to the operating system when it is freed, where the C library can be told so (glibc).

    Otherwise it keeps freed pieces of up to 32 MB for itself. Costs time: each large piece is new to the process.
    """
    threshold, arenas = -3, -8  # M_MMAP_THRESHOLD, M_ARENA_MAX of malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(threshold, OWN_PAGES)
        library.mallopt(arenas, 1)
    give_back_freed()
    give_back_code()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started
