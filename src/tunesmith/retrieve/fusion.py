"""Several rankings as one: reciprocal rank fusion (Cormack, Clarke & Büttcher 2009, "Reciprocal rank fusion outperforms
Condorcet and individual rank learning methods")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.retrieve.ranking import Ranker

K = 60
"""The constant of the paper, equation 1."""


class Hybrid:
    """Scores by the sum over rankers of 1 / (60 + rank), ranks counted from 1.

    Texts that a ranker scores alike share the best of their ranks.
    """

    def __init__(self, rankers: Sequence[Ranker]) -> None:
        self._rankers = rankers

    def scores(self, query: str) -> NDArray[np.float32]:
        """fp32 ``[texts]``."""
        found = [1 / (K + _ranks(ranker.scores(query))) for ranker in self._rankers]
        return np.sum(found, axis=0).astype(np.float32)


def _ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """How many texts score higher, and one."""
    ranks = 1 + len(scores) - np.searchsorted(np.sort(scores), scores, side="right")
    return ranks.astype(np.float64)
