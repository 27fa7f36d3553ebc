"""The report: one HTML file that says whether to ship a tuned model, and shows the evidence."""

from __future__ import annotations

from typing import Any

from tunesmith.pages.page import is_number, percent, render, scaled
from tunesmith.pages.sections import SECTIONS
from tunesmith.pages.sections.section import Part, as_part

VERDICTS = {"ship": "Ship", "dont_ship": "Don’t ship", "no_difference": "No difference shown"}


def report_page(report: dict[str, Any]) -> str:
    """Renders a report to one HTML page that needs nothing beside itself.

    Args:
        report: the dictionary of ``report.json``. ``verdict`` and ``sentence`` must be there; whatever else is
            missing or null is named on the page as not recorded.
    """
    part = as_part(report)
    bodies = [(section, section.body(part)) for section in SECTIONS]
    heeded = [(section.heed(part), section.name) for section in SECTIONS]
    return render(
        "report.html.j2",
        report=part,
        verdict=VERDICTS[report["verdict"]],
        sections=[
            {"name": section.name, "title": section.title, "body": body} for section, body in bodies if body is not None
        ],
        heed=[(text, name) for text, name in heeded if text is not None],
        trained=_trained(part["parameters"]),
    )


def _trained(parameters: Part | None) -> str | None:
    trainable, total = (parameters or Part())["trainable"], (parameters or Part())["total"]
    if not is_number(trainable) or not is_number(total) or not total:
        return scaled(trainable)
    return f"{scaled(trainable)} of {scaled(total)} ({percent(trainable / total, 2 if trainable < total / 10 else 0)})"
