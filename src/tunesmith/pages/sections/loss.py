"""The loss of training and validation."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.chart import loss_chart
from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section

ROWS = 20
"""Rows of the table beside the chart."""


def loss(report: Part) -> Markup:
    """The curves of both losses, and some of their numbers."""
    curves = report["curves"] or Part()
    chart = loss_chart(curves["train"], curves["validation"], curves["best_step"])
    return fragment("sections/loss.html.j2", loss_chart=chart, numbers=_numbers(curves), best=curves["best_step"])


def _numbers(curves: Part) -> list[tuple[float, float | None, float | None]]:
    """Step, training loss and validation loss: where validation was measured, else evenly."""
    train, validation = (dict(curves[name] or []) for name in ("train", "validation"))
    steps = sorted(step for step in (validation or train) if step is not None)
    chosen = steps if len(steps) <= ROWS else [steps[at * (len(steps) - 1) // (ROWS - 1)] for at in range(ROWS)]
    return [(step, train.get(step), validation.get(step)) for step in chosen]


LOSS = Section("loss", "Loss", loss)
