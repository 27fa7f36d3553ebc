"""A row as a file has it, and the one place where everything wrong with single rows is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.base import InputError, Source

SHOWN_ERRORS = 20


@dataclass(frozen=True)
class Record:
    """A row as the file has it."""

    fields: dict[str, Any]
    source: Source


class BadRow(ValueError):
    """What is wrong with one row."""


class RowErrors:
    """Collects what is wrong with single rows, counts all of it and shows the first twenty.

    Readers and converters add to the same object, so that one pass over all sources finds everything.
    """

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0
        self.first: Source | None = None
        self.fixes: list[str] = []

    def add(self, source: Source, what: str, fix: str = "") -> None:
        self.count += 1
        self.first = self.first or source
        if self.count <= SHOWN_ERRORS:
            self.shown.append(f"{source}: {what}")
        if fix and fix not in self.fixes:
            self.fixes.append(fix)

    def raise_any(self, fix: str = "") -> None:
        """Raises InputError when anything was added; every distinct fix is named once."""
        if not self.count:
            return
        more = f"\n… and {self.count - SHOWN_ERRORS} more" if self.count > SHOWN_ERRORS else ""
        noun = "row is" if self.count == 1 else "rows are"
        fixes = [*self.fixes, *([fix] if fix and fix not in self.fixes else [])]
        raise InputError(
            "\n".join(self.shown) + more + f"\n{self.count} {noun} wrong", fix="\n  → ".join(fixes) or None
        )
