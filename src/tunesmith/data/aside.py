"""A module of the package run in a second process, which leaves its result in the data cache or none at all."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunesmith.base import Progress

BETWEEN_LOOKS = 0.05
"""Seconds."""


@contextmanager
def running_aside(module: str, *arguments: str) -> Iterator[Callable[[str, Progress], None]]:
    """Starts ``python -m module arguments`` and yields a function that waits for its end, whatever that is.

    What the process says is not shown: when it has failed, the caller does its work and says what is wrong. It ends
    with the block.
    """
    nothing = subprocess.DEVNULL
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)

    def wait(label: str, progress: Progress) -> None:
        while process.poll() is None:
            progress(label, 0, 1)
            time.sleep(BETWEEN_LOOKS)

    try:
        yield wait
    finally:
        process.kill()
        process.wait()
