"""Workers that take turns: each is a process that stays alive, and the parent lets one of them work at a time.

The parent writes a number of steps to a worker's standard input; the worker does them, answers with one line of JSON
and blocks until the next number comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Largest resident memory of this process so far (Linux: VmHWM, which forgets what was before the program)."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Turns:
    """The worker's end. What libraries print goes to standard error, so that it cannot be mistaken for an answer."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._started = 0, 0.0
        self._steps: list[dict[str, Any]] = []

    def ready(self, **facts: Any) -> None:
        """Tells that everything is loaded, and waits for the first turn."""
        self._answer(facts)

    def took(self, step: dict[str, Any]) -> None:
        """Records a step; at the end of a turn answers and waits for the next one."""
        self._steps.append(step)
        self._left -= 1
        if self._left == 0:
            seconds = time.perf_counter() - self._started
            self._answer({"seconds": seconds, "steps": self._steps, "peak_bytes": peak_bytes()})
            self._steps = []

    def _answer(self, content: dict[str, Any]) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # the parent is done with this worker, or gone; nothing of it is kept
        self._left, self._started = int(line), time.perf_counter()


@dataclass
class Turn:
    """What a worker did in one turn: seconds of all of its steps together, and what it tells about each."""

    seconds: float
    steps: list[dict[str, Any]]
    peak_bytes: int

    def total(self, name: str) -> float:
        return sum(step[name] for step in self.steps)


class Side:
    """The parent's end of one worker.

    Attributes:
        turns: every turn so far, warm-up included.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self._log = name, log
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        self.turns: list[Turn] = []
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the worker told when it was ready; waits for that."""
        if self._facts is None:
            self._facts = self._answer()
        return self._facts

    def take(self, steps: int) -> Turn:
        """Waits until the worker is ready and lets it do some steps.

        Raises:
            SystemExit: when it died; its last words are shown.
        """
        assert self._process.stdin is not None and self.facts is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.turns.append(Turn(**self._answer()))
        return self.turns[-1]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(errors="replace").splitlines()[-15:]
            raise SystemExit("\n".join([f"the worker {self.name} ended with {self._process.wait()}:", *last]))
        return json.loads(line)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
