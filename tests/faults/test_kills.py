"""A sample of the kill matrix: death by SIGKILL at some moments, and the same bytes after `--resume`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are killed with Linux's means")
ROOT = Path(__file__).parents[2]


def matrix(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "bench" / "kill_matrix.py"), "--workers", "1", "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_killed_jobs_end_with_the_same_bytes() -> None:
    rows = matrix("--only", "lora, dropout, accumulation", "full", "mixture", "--every", "33")
    for row in rows:
        assert row["killed"] > 1
        assert not row["troubles"]
