"""What a check reports: a finding with its counts, its first instances, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tunesmith.data.check.masking import masked

Level = Literal["problem", "warning", "note"]

SHOWN = 20
"""Instances that are kept of a finding; every row is counted all the same."""

QUOTED = 60
"""Longest quotation in characters."""


@dataclass(frozen=True)
class Instance:
    """One example of a finding.

    Attributes:
        source: ``file:line`` of the row.
        what: what was found there, in words; personal data in quotations is masked.
        other: ``file:line`` of its twin, or empty.
    """

    source: str
    what: str
    other: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        rows: rows concerned, all of them counted.
        of: rows that were looked at.
        instances: the first `SHOWN` in the order in which the rows were added.
        fix: what to do, one sentence.
    """

    kind: str
    level: Level
    title: str
    rows: int
    of: int
    instances: tuple[Instance, ...]
    fix: str

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "instances": [asdict(instance) for instance in self.instances]}


@dataclass
class Tally:
    """Counts rows and keeps the first instances."""

    rows: int = 0
    instances: list[Instance] = field(default_factory=list)

    def add(self, source: object, what: str, other: object = "") -> None:
        self.rows += 1
        if len(self.instances) < SHOWN:
            self.instances.append(Instance(str(source), what, str(other)))

    @property
    def full(self) -> bool:
        return len(self.instances) >= SHOWN


def counted(number: int, one: str, many: str = "") -> str:
    """``1 row``, ``1,204 rows``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def agreeing(number: int, one: str, many: str) -> str:
    """The verb in its right number."""
    return one if number == 1 else many


def share(part: int, whole: int) -> str:
    """A percentage that never rounds something to nothing."""
    percent = 100 * part / max(whole, 1)
    return "under 0.1 %" if 0 < percent < 0.1 else f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def quoted(text: str, limit: int = QUOTED) -> str:
    """One line in double quotes, cut after ``limit`` characters, with personal data masked.

    An unprintable character is spelled because the terminal would obey it (escape sequences, right-to-left overrides).
    """
    line = masked(" ".join(text[: 8 * limit].split()))
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line[: limit + 1])
    return f'"{shown[: limit - 1]}…"' if len(shown) > limit else f'"{shown}"'
