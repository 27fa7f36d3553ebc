"""What is freed inside is kept for the next piece, and given back at the end."""

from __future__ import annotations

import ctypes
import sys

import psutil
import pytest
import torch

from tunesmith.models.freed_memory import keeping_freed_memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
pytestmark = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")

PIECE = 50 * 1024**2


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_freed_memory_stays_inside_and_goes_back_at_the_end() -> None:
    outside = resident()
    with keeping_freed_memory():
        torch.ones(PIECE, dtype=torch.uint8)
        kept = resident() - outside
    assert kept > 0.9 * PIECE
    assert resident() - outside < 0.1 * PIECE


def test_it_goes_back_after_an_error_too() -> None:
    outside = resident()
    with pytest.raises(ValueError, match="inside"), keeping_freed_memory():
        torch.ones(PIECE, dtype=torch.uint8)
        raise ValueError("inside")
    assert resident() - outside < 0.1 * PIECE
