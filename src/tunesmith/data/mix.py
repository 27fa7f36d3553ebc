"""The order in which rows are trained on: a pure function of seed and position, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


class RowOrder:
    """An endless stream of row indices, epoch after epoch.

    Without weights an epoch is every row once. With weights an epoch has as many places as there are rows, shared out
    exactly; each source fills its places from a stream of its own, in which no row comes again before every other row
    of that source was used, across epochs too.

    Args:
        origins: for each row the index of its source.
        weights: for each source its share; empty when every row is used once an epoch.
        seed: of the shuffle.

    Raises:
        ValueError: when a source with a weight has no rows.
    """

    def __init__(self, origins: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.origins = list(origins)
        self.weights = list(weights)
        self.seed = seed
        self.epoch_rows = len(self.origins)
        self.members: list[list[int]] = [[] for _ in self.weights]
        if self.weights:
            for index, origin in enumerate(self.origins):
                self.members[origin].append(index)
        if not all(self.members):
            raise ValueError("every source with a weight needs a row")
        self.counts = shares(self.weights, self.epoch_rows) if self.weights else []
        self._epoch = lru_cache(maxsize=2)(self._shuffled)
        self._pass = lru_cache(maxsize=2 * max(1, len(self.weights)))(self._passed)

    def rows(self, start: int, stop: int) -> list[int]:
        """Indices of the rows at positions ``start`` to ``stop`` of the stream."""
        return [self._epoch(at // self.epoch_rows)[at % self.epoch_rows] for at in range(start, stop)]

    def _shuffled(self, epoch: int) -> list[int]:
        if not self.weights:
            return self._permutation(self.epoch_rows, epoch)
        places = [source for source, count in enumerate(self.counts) for _ in range(count)]
        used = [count * epoch for count in self.counts]
        chosen = []
        for at in self._permutation(len(places), epoch):
            source = places[at]
            round_, position = divmod(used[source], len(self.members[source]))
            chosen.append(self._pass(source, round_)[position])
            used[source] += 1
        return chosen

    def _passed(self, source: int, round_: int) -> list[int]:
        members = self.members[source]
        return [members[at] for at in self._permutation(len(members), round_, source + 1)]

    def _permutation(self, length: int, number: int, stream: int = 0) -> list[int]:
        seed = self.seed * 1_000_003 + number + stream * 0x9E3779B97F4A7C15
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportions of ``weights`` that add up to ``total`` (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
