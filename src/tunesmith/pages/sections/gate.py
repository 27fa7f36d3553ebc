"""What the recipe requires before the model may ship."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section


def gate(report: Part) -> Markup:
    """Every requirement with what was measured; one that could not be checked is no pass."""
    return fragment("sections/gate.html.j2", report=report)


def unchecked(report: Part) -> str | None:
    """How many requirements could not be checked."""
    missing = sum(row["passed"] is None for row in report["gate"] or [])
    return f"{missing} of {len(report['gate'])} requirements could not be checked" if missing else None


GATE = Section("gate", "Gate", gate, unchecked)
