"""The order in which rows are trained on: a pure function of seed and position, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


class RowOrder:
    """An endless stream of row indices, epoch after epoch.

    Args:
        origins: for each row the index of its source.
        weights: for each source its share; empty when every row is used once an epoch.
        seed: of the shuffle.
    """

    def __init__(self, origins: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.origins = list(origins)
        self.weights = list(weights)
        self.seed = seed
        self.epoch_rows = len(self.origins)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def rows(self, start: int, stop: int) -> list[int]:
        """Indices of the rows at positions ``start`` to ``stop`` of the stream."""
        return [self._epoch(at // self.epoch_rows)[at % self.epoch_rows] for at in range(start, stop)]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        if not self.weights:
            return torch.randperm(self.epoch_rows, generator=generator).tolist()
        chosen: list[int] = []
        for source, count in enumerate(_shares(self.weights, self.epoch_rows)):
            members = [index for index, origin in enumerate(self.origins) if origin == source]
            # Whole passes first, so that no row is drawn again before every other one of its source was.
            while count > 0 and members:
                order = torch.randperm(len(members), generator=generator).tolist()[:count]
                chosen += [members[at] for at in order]
                count -= len(order)
        return [chosen[at] for at in torch.randperm(len(chosen), generator=generator).tolist()]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportions of ``weights`` that add up to ``total`` (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
