"""Test rows and items of benchmarks that stand in the rows that a job trained on."""

from __future__ import annotations

from typing import Any

from tunesmith.base import Progress
from tunesmith.data.contamination import Contamination
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.evaluation.benchmarks import Asked, item_texts
from tunesmith.pipeline.planning import Planned

TEST_ROWS = "test rows"
ENOUGH = 0.7
"""Share of a test row's runs of words that must be found."""


def contamination(
    planned: Planned, rows: list[Rendered], asked: Asked | None, progress: Progress
) -> list[dict[str, Any]]:
    """How many test rows and items of each benchmark stand in the training rows, as `Contamination.found` says it.

    Raises:
        InputError: when the items of a benchmark cannot be had.
    """
    prepared = planned.prepared
    assert prepared is not None
    items = {TEST_ROWS: [text_of(row.row) for row in rows]}
    if asked is not None:
        items |= item_texts(asked, progress)
    looking = Contamination(items, {TEST_ROWS: ENOUGH})
    progress("looking for test items in the training rows", 0, None)
    looking.look((str(row.source), text_of(row)) for row in prepared.train.sources())
    return looking.found()


def text_of(row: Row) -> str:
    """What a row says, without the names of roles."""
    said = [turn["content"] for turn in row.messages if isinstance(turn.get("content"), str)]
    return " ".join([*said, row.text, *row.words])
