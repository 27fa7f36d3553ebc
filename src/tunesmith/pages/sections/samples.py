"""Answers side by side."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section


def samples(report: Part) -> Markup:
    """Rows where tuning helped most and where it hurt most."""
    return fragment("sections/samples.html.j2", report=report)


SAMPLES = Section("samples", "Samples", samples)
