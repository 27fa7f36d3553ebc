"""Training answers that come back from their prompts."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import fragment, percent
from tunesmith.pages.sections.section import Part, Section

STATES = {"measured": "measured", "off": "not checked", "could_not_run": "could not run"}


def memorisation(report: Part) -> Markup | None:
    """What came back of training and of held-out answers; None in a report from before this was measured."""
    found: Part | None = report["memorisation"]
    if found is None:
        return None
    difference = found["difference"]
    span = None
    if difference is not None:
        value, low, high = (percent(difference[end], sign=True) for end in ("value", "low", "high"))
        span = f"{value} (interval {low} to {high})"
    return fragment(
        "sections/memorisation.html.j2",
        found=found,
        state=STATES.get(str(found["status"]), "not recorded"),
        span=span,
        groups=[("Training answers", found["trained"]), ("Held-out answers", found["held_out"])],
    )


def heeded(report: Part) -> str | None:
    """That something came back which is worth a look."""
    return "Training answers come back by heart" if (report["memorisation"] or Part())["remark"] else None


MEMORISATION = Section("memorisation", "Memorisation", memorisation, heeded)
