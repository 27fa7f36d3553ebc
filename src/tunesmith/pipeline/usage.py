"""What a job really used: peak memory and time."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch


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


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started
