"""What a person or a program sees while a job runs: a bar on a terminal, plain lines elsewhere, JSON on request."""

from __future__ import annotations

import json
import os
import sys
import time
from types import TracebackType
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_SECONDS = 5.0
QUIET_SECONDS = 2.0


class Display:
    """Shows long waits and training events.

    Args:
        as_json: print one event a line on standard output, and nothing else.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.console = Console(stderr=True)
        self.lively = self.console.is_terminal and not as_json
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.label = ""
        self.label_since = self.last_line = time.monotonic()
        self.last_step = 0.0
        self.reward: float | None = None
        self.steps = 0

    def __enter__(self) -> Display:
        if self.lively:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def progress(self, label: str, done: int, total: int | None) -> None:
        """Shows how far something has come; used as the `progress` callback everywhere."""
        if self.as_json:
            return
        if self.bar is not None:
            self._show_bar(label, done, total, f"{done:,}/{total:,}" if total else "")
            return
        now = time.monotonic()
        if label != self.label:
            self.label, self.label_since, self.last_line = label, now, now - PLAIN_EVERY_SECONDS + QUIET_SECONDS
            if total is None:
                self.line(label)
        elif now - self.last_line >= PLAIN_EVERY_SECONDS:
            self.last_line = now
            self.line(f"{label}: {done:,}" + (f" of {total:,}" if total else ""))

    def event(self, event: dict[str, Any]) -> None:
        """Shows an event of a run."""
        if self.as_json:
            print(json.dumps(event), flush=True)
            return
        kind = event["event"]
        if kind == "step":
            self._step(event)
        elif kind == "validation":
            self.line(f"step {event['step']}: validation loss {_number(event['loss'])}")
        elif kind == "answers":
            scores = ", ".join(f"{name} {value:.3f}" for name, value in event["metrics"].items())
            self.line(f"step {event['step']}: {scores}")
        elif kind == "solver":
            losses = f"{event['solver']:.4f}, after gradient steps {event['gradient']:.4f}"
            self.line(f"exact solver: loss on rows held back {losses}; kept: {event['kept']}")
        elif kind == "rollout":
            self.reward = event["reward"]
        elif kind == "note":
            self.line(event["message"])
        elif kind == "warning":
            self.line(f"warning: {event['message']}")

    def planned_steps(self, steps: int) -> None:
        self.steps = steps

    def line(self, text: str) -> None:
        if self.lively:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _step(self, event: dict[str, Any]) -> None:
        speed = event["tokens"] / max(1e-9, event["seconds"])
        memory = psutil.Process().memory_info().rss / 2**30
        measured = f"loss {_number(event['loss'])}" if self.reward is None else f"reward {self.reward:.3f}"
        figures = f"{measured}  {speed:,.0f} tokens/s  {memory:.1f} GiB"
        if self.bar is not None:
            total = self.steps or None
            self._show_bar("training", event["step"], total, f"step {event['step']}/{self.steps}  {figures}")
            return
        now = time.monotonic()
        if event["step"] == 1 or event["step"] == self.steps or now - self.last_step >= PLAIN_EVERY_SECONDS:
            self.last_step = now
            left = (self.steps - event["step"]) * event["seconds"]
            self.line(f"step {event['step']}/{self.steps}  {figures}  {_duration(left)} left")

    def _show_bar(self, label: str, done: int, total: int | None, figures: str) -> None:
        assert self.bar is not None
        if label != self.label or self.task is None:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(label, total=total, figures=figures)
            self.label = label
        self.bar.update(self.task, completed=done, total=total, figures=figures)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def quiet_libraries() -> None:
    """Keeps the bars and warnings of libraries out of our own output."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from tunesmith.models.quantized import silence_optional_kernel

    silence_optional_kernel()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # which tells of every attempt; what comes of them is told once
    # Read by `datasets` when it is imported, which takes a second and is often not needed at all.
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def out(text: str = "") -> None:
    """A line of the answer, on standard output."""
    print(text)
    sys.stdout.flush()
