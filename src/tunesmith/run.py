"""A run on disk: a directory that is the only source of truth about a job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from tunesmith.base import InputError
from tunesmith.files import ASIDE, new_directory, read_json, recovered, sync_file, write_json, write_text

RECIPE, PLAN, DATA, ENVIRONMENT = "recipe.yaml", "plan.json", "data.json", "environment.json"
EVENTS, REPORT, PAGE = "events.jsonl", "report.json", "report.html"
LOCK, HELD = "run.lock", ".held"
"""Who works in a run (process and start time), and the empty file that the operating system locks for it."""
CHANGES = "changes.json"
SEEDS = "seeds.json"
"""In the directory of several runs that differ in their seed alone: their names."""
RESULTS = ("adapter", "model")
MERGED = "merged-"
"""Opens the name of the directory with a run's adapter folded into a copy of its base; the weights' dtype ends it."""
RESTORE = "restore it from a copy, or start a new run: output=runs/NAME"
ELSEWHERE = "name another one: output=runs/NAME"
BASE_EVALUATION, TUNED_EVALUATION = "evaluation.base.json", "evaluation.tuned.json"
PROMPTED_EVALUATION = "evaluation.prompted.json"
"""Of the base behind the system text that the student learned to do without."""


class Run:
    """A run's directory.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @staticmethod
    def refuse_occupied(path: Path) -> None:
        """Raises InputError when a directory holds a run already, or other files."""
        if (path / RECIPE).exists():
            raise InputError(
                "this directory holds a run already; it is never overwritten",
                where=path,
                fix="continue it with --resume, or name another directory: output=runs/NAME",
            )
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise InputError("this is not an empty directory", where=path, fix=ELSEWHERE)

    @staticmethod
    def create(path: Path, values: dict[str, Any], texts: dict[str, str]) -> Run:
        """Makes the directory of a new run with its first files, whole or not at all.

        Args:
            values: by name the files that are JSON.
            texts: by name the other files.

        Raises:
            InputError: when the directory is occupied or cannot be written.
        """
        Run.refuse_occupied(path)
        try:
            with new_directory(path) as directory:
                for name, value in values.items():
                    write_json(directory / name, value)
                for name, text in texts.items():
                    write_text(directory / name, text)
        except FileExistsError:
            Run.refuse_occupied(path)
            raise InputError("another process has just begun a run here", where=path, fix=ELSEWHERE) from None
        except OSError as error:
            raise InputError(f"the directory cannot be made: {error.strerror}", where=path, fix=ELSEWHERE) from error
        return Run(path)

    @staticmethod
    def to_resume(path: Path) -> Run | None:
        """The run to go on with; None when nothing was begun yet, so that one command may be repeated until it is done.

        Raises:
            InputError: when there is something else.
        """
        if (path / RECIPE).is_file():
            return Run(path)
        Run.refuse_occupied(path)
        return None

    @staticmethod
    def open(path: str | Path) -> Run:
        """Opens an existing run. Raises InputError when there is none."""
        directory = Path(path)
        if not (directory / RECIPE).is_file():
            raise InputError("there is no run here", where=path, fix="`tunesmith runs` lists runs")
        return Run(directory)

    @property
    def events_path(self) -> Path:
        return self.path / EVENTS

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def page(self) -> Path:
        return self.path / PAGE

    @property
    def result(self) -> Path | None:
        """The directory of the trained adapter or model, when training has ended."""
        return next((self.path / name for name in RESULTS if (self.path / name).is_dir()), None)

    @property
    def report(self) -> dict[str, Any] | None:
        return self.read(REPORT) if (self.path / REPORT).is_file() else None

    def read(self, name: str) -> Any:
        """Reads one of the run's JSON files. Raises InputError when it is missing or damaged."""
        try:
            return read_json(self.path / name)
        except FileNotFoundError as error:
            raise InputError("the run has no such file", where=self.path / name, fix=RESTORE) from error
        except ValueError as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            where = f"{self.path / name}{line}"
            raise InputError("this file of the run is damaged: it is no JSON", where=where, fix=RESTORE) from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=self.path / name, fix=RESTORE) from error

    def write(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def append_event(self, event: dict[str, Any]) -> None:
        with open(self.events_path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a last line that was cut off by a crash is left out."""
        if not self.events_path.is_file():
            return []
        events = []
        for line in self.events_path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return events

    def synced_events(self) -> int:
        """Length of the log in bytes, all of which are on the disk now."""
        if not self.events_path.is_file():
            return 0
        sync_file(self.events_path)
        return self.events_path.stat().st_size

    def truncate_events(self, length: int) -> bool:
        """Drops what was logged after a checkpoint: a resumed run will do it again.

        Returns:
            Whether the log is whole; a part of a last line is dropped too.
        """
        size = self.events_path.stat().st_size if self.events_path.is_file() else 0
        if size:
            with open(self.events_path, "rb+") as file:
                kept = file.read(length)
                file.truncate(kept.rfind(b"\n") + 1)
        return size >= length

    def summary(self) -> dict[str, Any]:
        """One line about the run, for lists."""
        recipe = yaml.safe_load((self.path / RECIPE).read_text(encoding="utf-8"))
        events, report = self.events(), self.report
        last = events[-1]["event"] if events else "started"
        state = {"failed": "failed", "interrupted": "interrupted"}.get(last, "unfinished")
        return {
            "run": str(self.path),
            "state": "done" if report is not None else "running" if self.holder() else state,
            "steps": max((event.get("step", 0) for event in events), default=0),
            "model": recipe["model"]["path"],
            "method": recipe["method"]["kind"],
            "verdict": report["verdict"] if report is not None else None,
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process, and mends what a killed one left.

        The operating system holds the lock and lets go of it when the process ends, however it ends.

        Raises:
            InputError: when another live process holds it.
        """
        lock = FileLock(self.path / HELD)
        try:
            lock.acquire(timeout=0)
        except NotImplementedError as error:
            raise InputError(
                "the file system of this directory cannot lock files, so two processes could spoil the run",
                where=self.path,
                fix="name a directory on another one: output=…",
            ) from error
        except Timeout:
            raise InputError(
                f"process {(self.holder() or {}).get('pid', 'unknown')} is working in this run",
                where=self.path,
                fix="wait for it, stop it, or name another directory: output=runs/NAME",
            ) from None
        try:
            for directory in (self.path, self.checkpoints):
                recovered(directory)
            self.write(LOCK, {"pid": os.getpid(), "started": psutil.Process().create_time()})
            yield
        finally:
            (self.path / LOCK).unlink(missing_ok=True)
            lock.release()

    def holder(self) -> dict[str, Any] | None:
        """Process id and start time of the live process that works in this run, if one does."""
        try:
            holder = read_json(self.path / LOCK)
            alive = abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0
        except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
            return None
        return holder if alive else None


def find_runs(root: Path) -> list[Run]:
    """All runs below a directory, oldest first."""
    if not root.is_dir():
        return []
    found = [
        path.parent
        for path in root.rglob(RECIPE)
        if "checkpoints" not in path.parts and not any(ASIDE in part for part in path.parts)
    ]
    return [Run(path) for path in sorted(found, key=lambda path: (path / RECIPE).stat().st_mtime)]
