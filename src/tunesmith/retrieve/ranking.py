"""What every retriever is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Ranker(Protocol):
    """Says of every stored text how well it answers a query."""

    def scores(self, query: str) -> NDArray[np.float32]:
        """fp32 ``[texts]``, more is better."""
        ...


def best(scores: NDArray[np.float32], count: int, without: Sequence[int] = ()) -> list[int]:
    """Numbers of the ``count`` texts with the highest scores, the best first; ties in the order of the texts."""
    left = set(without)
    order = np.argsort(-scores, kind="stable")
    return [int(at) for at in order[: count + len(left)] if int(at) not in left][:count]
