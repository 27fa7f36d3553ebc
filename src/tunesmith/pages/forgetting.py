"""The page of `runs forgetting`: task score against forgetting over the checkpoints of a run."""

from __future__ import annotations

from typing import Any

from tunesmith.pages.page import render
from tunesmith.pages.sections.ability import forgetting_chart


def forgetting_page(name: str, curve: dict[str, Any]) -> str:
    """Renders a curve to one HTML page that needs nothing beside itself.

    Args:
        name: of the run.
        curve: from `pipeline.forgetting_curve`.
    """
    chart = forgetting_chart(curve["points"], curve["metric"])
    return render("forgetting.html.j2", name=name, curve=curve, chart=chart)
