"""What is freed inside is kept for the next piece, and given back at the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
pytestmark = pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")

# In a process of its own: what other tests have freed would take the pieces in.
SCRIPT = """
import psutil, torch
from tunesmith.models.freed_memory import keeping_freed_memory

PIECE = 50 * 1024**2
torch.ones(PIECE, dtype=torch.uint8)
outside = psutil.Process().memory_info().rss
try:
    with keeping_freed_memory():
        torch.ones(PIECE, dtype=torch.uint8)
        kept = psutil.Process().memory_info().rss - outside
        {end}
except ValueError:
    pass
left = psutil.Process().memory_info().rss - outside
assert kept > 0.9 * PIECE, kept
assert left < 0.1 * PIECE, left
"""


@pytest.mark.parametrize("end", ["pass", "raise ValueError"])
def test_freed_memory_stays_inside_and_goes_back_at_the_end(end: str) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], check=True)
