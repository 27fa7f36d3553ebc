"""The loss of training and validation."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.chart import loss_chart
from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section


def loss(report: Part) -> Markup:
    """The curves of both losses."""
    curves = report["curves"] or Part()
    return fragment(
        "sections/loss.html.j2", loss_chart=loss_chart(curves["train"], curves["validation"], curves["best_step"])
    )


LOSS = Section("loss", "Loss", loss)
