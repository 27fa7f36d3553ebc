"""What became of every `auto`, as it is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.resolved import Resolved


@dataclass
class Decisions:
    """Collects what every `auto` became."""

    made: list[Resolved] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settle(self, name: str, asked: Any, value: Any, reason: str) -> Any:
        """Returns what was asked, or records and returns ``value`` when `auto` was asked."""
        if asked != "auto":
            return asked
        self.made.append(Resolved(name=name, value=value, reason=reason))
        return value
