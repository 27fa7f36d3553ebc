"""What several runs that differ in their seed alone came to."""

from __future__ import annotations

from statistics import stdev
from typing import Any

from markupsafe import Markup

from tunesmith.pages.page import fragment, is_number, number
from tunesmith.pages.sections.section import Part, Section

VERDICTS = {"ship": "ship", "dont_ship": "don’t ship", "no_difference": "no difference shown"}


def seeds(report: Part) -> Markup | None:
    """Each seed's own result beside the spread; nothing for a report on one run."""
    found = report["seeds"]
    if not found:
        return None
    names = list(found[0]["values"] or {})
    rows = [
        {
            "seed": one["seed"],
            "run": one["run"],
            "verdict": VERDICTS.get(one["verdict"]),
            "values": [number(one["values"].get(name)) for name in names],
        }
        for one in found
    ]
    return fragment("sections/seeds.html.j2", names=names, rows=rows, spread=[_spread(found, name) for name in names])


def _spread(found: list[Any], name: str) -> str | None:
    values = [one["values"][name] for one in found if is_number(one["values"].get(name))]
    return number(stdev(values)) if len(values) > 1 else None


SEEDS = Section("seeds", "Seeds", seeds)
