"""What a section of the report is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup


class Part(dict[str, Any]):
    """A part of a report in which a missing key reads as ``None``: the page then says "not recorded"."""

    def __missing__(self, key: str) -> None:
        return None


def as_part(value: Any) -> Any:
    """A report, or a value in it, whose mappings are all `Part`s."""
    if isinstance(value, Mapping):
        return Part({key: as_part(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        # A curve can have a hundred thousand points, and has no keys to miss.
        return [as_part(item) for item in value] if value and isinstance(value[0], Mapping) else list(value)
    return value


def nothing(report: Part) -> str | None:
    """Of a section about which a reader of the verdict alone misses nothing."""
    return None


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        name: its id on the page.
        title: its heading.
        body: what it shows of a report; None leaves the section out, where most reports have nothing of the kind. What
            every report should have and this one lacks is shown as not recorded instead.
        heed: what a reader of the verdict alone must not miss, in a few words; it stands below the verdict and leads
            here. None where there is nothing of the kind.
    """

    name: str
    title: str
    body: Callable[[Part], Markup | None]
    heed: Callable[[Part], str | None] = nothing
