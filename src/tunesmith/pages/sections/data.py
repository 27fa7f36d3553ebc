"""What the model learned from, and what it did not see."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import fragment, is_number, percent
from tunesmith.pages.sections.section import Part, Section


def data(report: Part) -> Markup:
    """Rows used and lost, where they came from, and what was held out."""
    return fragment("sections/data.html.j2", report=report, lost_share=_lost_share(report["data"] or Part()))


def _lost_share(data: Part) -> str:
    used, lost = data["rows_used"], data["rows_lost"]
    if not is_number(used) or not is_number(lost):
        return "How many rows were lost is not recorded."
    if not lost:
        return "No row was lost."
    told = f"{percent(lost / (used + lost))} of all rows were lost."
    return told if data["lost"] else f"{told} The reasons are not recorded."


DATA = Section("data", "Data", data)
