"""What everything else is built on: settings that are strict, one family of errors, places in files, and progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

Progress = Callable[[str, int, int | None], None]
"""Label, done, total (None when unknown)."""


def silent(label: str, done: int, total: int | None) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Source:
    """Where a row came from: the file as the user named it, and the line or record counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class TunesmithError(Exception):
    """What went wrong, where it stands, and what to do about it.

    Args:
        what: one sentence without a trailing full stop.
        where: the file, line or key, for example ``recipe.yaml:4 train.epochs``.
        fix: what the reader can do, one sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  → {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"


class InputError(TunesmithError):
    """The user's recipe, data, model or arguments are wrong: exit code 2."""

    exit_code: ClassVar[int] = 2


class TrainingError(TunesmithError):
    """A run died (divergence, collapse, a dead adapter) although its input was well formed: exit code 1."""


class Interrupted(TunesmithError):
    """A run was stopped by a signal and can be resumed: exit code 130."""

    exit_code: ClassVar[int] = 130


class Spec(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
