"""The report's section on training answers that come back from their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tunesmith.pages.page import percent, render

NAME, TITLE = "memorisation", "Memorisation"


def memorisation_section(section: Mapping[str, Any] | None) -> Markup:
    """A whole `<section>`.

    Args:
        section: `memorisation` of a report; None in one from before it was measured.
    """
    found = dict(section or {"status": None, "reason": None})
    difference = found.get("difference")
    span = None
    if difference is not None:
        ends = [percent(difference[end], sign=True) for end in ("value", "low", "high")]
        span = f"{ends[0]} (interval {ends[1]} to {ends[2]})"
    state = {"measured": "measured", "off": "not checked", "could_not_run": "could not run"}
    return Markup(
        render(
            "memorisation.html.j2",
            name=NAME,
            title=TITLE,
            section=found,
            state=state.get(str(found["status"]), "not recorded"),
            span=span,
            groups=[
                ("Training answers", found.get("trained") or {}),
                ("Held-out answers", found.get("held_out") or {}),
            ],
        )
    )
