"""The page of ``advise --cost --html``: retrieval against tuning, added up month by month."""

from __future__ import annotations

from typing import Any

from tunesmith.pages.chart import Line, line_chart
from tunesmith.pages.page import render


def cost_page(found: dict[str, Any]) -> str:
    """Renders a comparison of costs to one HTML page that needs nothing beside itself.

    Args:
        found: ``Costs.as_json()``.
    """
    months, total = found["cumulative"], found["total"]
    lines = [
        Line("retrieval", [(at["month"], at["rag"]) for at in months], "solid"),
        Line("tuning", [(at["month"], at["tuned"]) for at in months], "marked"),
    ]
    crossing = found["crossing_month"]
    currency = found["prices"]["currency"]
    notes = (
        [f"The lines cross by the end of month {crossing}."] if crossing is not None else ["The lines do not cross."]
    )
    return render(
        "cost.html.j2",
        found=found,
        cheaper="retrieval" if total["rag"] <= total["tuned"] else "tuning",
        chart=line_chart(
            lines,
            title=f"Cost so far in {currency}, by month",
            desc=found["sentence"],
            notes=notes,
            axes=(currency, "month"),
            identity="cost",
        ),
    )
