"""Freed memory: given back to the operating system, or kept for the next piece of the same size (glibc)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.files import let_go_of_pages

OWN_PAGES = 32 * 1024
"""Bytes from which a piece of memory gets pages of its own under a memory budget."""

# Of malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8
NEVER = -1
# What the C library goes up to by itself once pieces of that size have been freed, and how many pieces it maps.
USUAL_TRIM, USUAL_MMAP, USUAL_PIECES = 64 * 1024**2, 32 * 1024**2, 65536

NO_GLIBC = OSError, AttributeError, TypeError
"""How other systems say that they do not have its functions; Windows takes no nameless library."""

_small = False


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
    with suppress(*NO_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory_small() -> None:
    """Lets memory go back to the operating system when it is freed, where the C library can be told so (glibc).

    Otherwise it keeps freed pieces of up to 32 MB for itself. Costs time: each large piece is new to the process.
    """
    global _small
    _small = True
    _set({MMAP_THRESHOLD: OWN_PAGES, ARENA_MAX: 1})
    give_back_freed()
    give_back_code()


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Lets the process keep what is freed inside, where the C library can be told so; given back at the end.

    Passes without gradients free everything that they make, and tens of megabytes at a time otherwise go back to the
    operating system, which fills every page with zeros before it lends it again. Does nothing where memory is to be
    small.
    """
    if _small:
        yield
        return
    _set({MMAP_MAX: 0, TRIM_THRESHOLD: NEVER})
    try:
        yield
    finally:
        _set({MMAP_MAX: USUAL_PIECES, MMAP_THRESHOLD: USUAL_MMAP, TRIM_THRESHOLD: USUAL_TRIM})
        give_back_freed()


def _set(settings: dict[int, int]) -> None:
    with suppress(*NO_GLIBC):
        library = ctypes.CDLL(None)
        for name, value in settings.items():
            library.mallopt(name, value)
