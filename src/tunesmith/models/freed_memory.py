"""Freed memory is kept by the process, so that the next tensor of that size does not ask the system for new pages."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's `mallopt`."""

_LARGEST_KEPT, _GROWTH, _NEVER = 2**30, 2**26, 2**31 - 1


def keep_freed_memory() -> None:
    """Lets glibc hold on to freed blocks of up to a gigabyte instead of giving each back at once.

    A training step frees and asks for the same blocks in every layer; without this the system maps and clears every
    page of them anew, which took a quarter of the step. Other C libraries have no such setting and are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        for parameter, value in ((_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWTH)):
            adjust(parameter, value)
