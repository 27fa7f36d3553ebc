"""What a plan is made from besides its recipe: what the data say of the job's size and of its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tunesmith.evaluation.compare import LIKELIHOODS
from tunesmith.resolved import Workload


@dataclass(frozen=True)
class Judged:
    """What the evaluation will be, as far as the data decides it.

    Attributes:
        limit: new tokens of an answer that the objective itself allows; None where references say it.
        answers: tokens of each reference answer.
        row: tokens of a held-out row on average, and ``longest`` of the longest; 0 where rows are like those that are
            trained on.
    """

    metrics: list[str]
    why: str
    rows: int
    longest_answer: int
    writes: bool = True
    limit: int | None = None
    answers: tuple[int, ...] = ()
    row: float = 0.0
    longest: int = 0

    @property
    def generates(self) -> bool:
        """Whether held-out rows are answered, and not only read."""
        return self.writes and any(name not in LIKELIHOODS for name in self.metrics)


class Largest(NamedTuple):
    """Of a job's micro-batches: tokens of the largest and the targets among them, how many sizes there are,
    and how many micro-batches.

    Sizes are counted as `models.projection.rounded_up` makes them.
    """

    tokens: int
    targets: int
    sizes: int
    passes: int = 1


Heaviest = Callable[[int], Largest]
"""From rows of a micro-batch to the largest one that the job will have."""


@dataclass(frozen=True)
class Given:
    """What is known of a job besides its recipe.

    Attributes:
        max_length: longest row that is trained on, in tokens.
        heaviest: read off the rows in their order; None where it must be estimated from the averages.
        beside: bytes of other models that stay in memory while this one is trained.
        before: bytes of a model that is gone before this one is loaded.
    """

    workload: Workload
    judged: Judged
    max_length: int
    heaviest: Heaviest | None = None
    beside: float = 0.0
    before: float = 0.0
