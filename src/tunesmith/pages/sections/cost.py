"""Memory and time: what the plan foresaw against what the run took."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import count, duration, fragment, is_number, percent, size
from tunesmith.pages.sections.section import Part, Section


def cost(report: Part) -> Markup:
    """Predicted beside measured."""
    predicted, measured = report["predicted"] or Part(), report["measured"] or Part()
    return fragment("sections/cost.html.j2", report=report, cost=_lines(predicted, measured))


def _lines(predicted: Part, measured: Part) -> list[tuple[str, str | None, str | None, str]]:
    def off(name: str) -> str:
        foreseen, taken = predicted[name], measured[name]
        if not is_number(foreseen) or not is_number(taken) or not foreseen:
            return ""
        change = taken / foreseen - 1
        if abs(change) < 0.005:
            return "as predicted"
        return f"{percent(abs(change), 0)} {'more' if change > 0 else 'less'} than predicted"

    speed = measured["tokens_per_second"]
    return [
        ("Peak memory", size(predicted["peak_bytes"]), size(measured["peak_bytes"]), off("peak_bytes")),
        ("Time", duration(predicted["seconds"]), duration(measured["seconds"]), off("seconds")),
        ("Speed", "not predicted", None if speed is None else f"{count(speed)} tokens/s", ""),
    ]


COST = Section("cost", "Memory and time", cost)
