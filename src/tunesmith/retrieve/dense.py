"""Retrieval by a sentence encoder: cosines between vectors (Karpukhin et al. 2020, dense passage retrieval)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.models.encoder import Encoder


class Dense:
    """Scores by cosine.

    Args:
        vectors: fp32 ``[texts, width]`` of length 1.
        encoder: that made them, which reads queries too.
    """

    def __init__(self, vectors: NDArray[np.float32], encoder: Encoder) -> None:
        self._vectors, self._encoder = vectors, encoder

    def scores(self, query: str) -> NDArray[np.float32]:
        """fp32 ``[texts]``, between -1 and 1."""
        return self._vectors @ self._encoder.vectors([query])[0].numpy()
