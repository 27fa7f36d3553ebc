"""The order in which rows are trained on: a pure function of seed and position, so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tunesmith.base import InputError
from tunesmith.data.spec import DataSpec, SourceSpec


class RowOrder:
    """An endless stream of row indices, epoch after epoch.

    Without ``counts`` an epoch is every row once. With them an epoch has ``counts[source]`` places for each source;
    each source fills its places from a stream of its own, in which no row comes again before every other row of that
    source was used, across epochs too.

    Args:
        origins: for each row the index of its source.
        counts: for each source its places in an epoch; empty when every row is used once.
        seed: of the shuffle.

    Raises:
        ValueError: when a source with places has no rows.
    """

    def __init__(self, origins: Sequence[int] | Tensor, counts: Sequence[int], seed: int) -> None:
        of_rows = torch.as_tensor(origins, dtype=torch.int64)
        self.counts, self.seed = list(counts), seed
        self.epoch_rows = sum(self.counts) if self.counts else len(of_rows)
        self.members = [torch.nonzero(of_rows == source).flatten() for source in range(len(self.counts))]
        if any(count and not len(rows) for count, rows in zip(self.counts, self.members, strict=True)):
            raise ValueError("every source with places in an epoch needs a row")
        self._epoch = lru_cache(maxsize=2)(self._shuffled)
        self._pass = lru_cache(maxsize=2 * max(1, len(self.counts)))(self._passed)

    def rows(self, start: int, stop: int) -> list[int]:
        """Indices of the rows at positions ``start`` to ``stop`` of the stream."""
        found: list[int] = []
        while start < stop:
            epoch, at = divmod(start, self.epoch_rows)
            piece = self._epoch(epoch)[at : at + stop - start].tolist()
            found += piece
            start += len(piece)
        return found

    def _shuffled(self, epoch: int) -> Tensor:
        if not self.counts:
            return self._permutation(self.epoch_rows, epoch)
        places = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        places = places[self._permutation(len(places), epoch)]
        chosen = torch.empty(len(places), dtype=torch.int64)
        for source, count in enumerate(self.counts):
            if count:
                chosen[places == source] = self._stream(source, count * epoch, count)
        return chosen

    def _stream(self, source: int, start: int, count: int) -> Tensor:
        """``count`` rows of one source from position ``start`` of its own stream."""
        length, pieces = len(self.members[source]), []
        while count > 0:
            round_, position = divmod(start, length)
            pieces.append(self._pass(source, round_)[position : position + count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return torch.cat(pieces)

    def _passed(self, source: int, round_: int) -> Tensor:
        members = self.members[source]
        return members[self._permutation(len(members), round_, source + 1)]

    def _permutation(self, length: int, number: int, stream: int = 0) -> Tensor:
        seed = self.seed * 1_000_003 + number + stream * 0x9E3779B97F4A7C15
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed % 2**63))


def places_in_an_epoch(spec: DataSpec, sources: Sequence[SourceSpec], rows: Sequence[int]) -> list[int]:
    """How many rows of each source an epoch has; empty when every row is used once.

    Args:
        sources: the training sources, the replayed one last.
        rows: how many rows each of them has left.

    Raises:
        InputError: when a source that is to be mixed in has no rows, or would give none to an epoch.
    """
    tasks = sources[:-1] if spec.replay else sources
    weights = mixture_weights(spec, tasks, rows)
    epochs = [source.epochs for source in tasks]
    if weights:
        counts = shares(weights, sum(rows[: len(tasks)]))
    elif any(value is not None for value in epochs):
        counts = [round((value or 1.0) * count) for value, count in zip(epochs, rows, strict=False)]
    elif spec.replay:
        counts = list(rows[: len(tasks)])
    else:
        return []
    if spec.replay:
        counts.append(round(sum(counts) * spec.replay.share / (1 - spec.replay.share)))
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        where = "data.replay.share" if index == len(tasks) else f"data.train.{index}.{_mixed_by(source)}"
        if not rows[index]:
            raise InputError(
                f"no row of {source.path} is left, so its share cannot be kept",
                where=where,
                fix="see data.duplicates, data.overlap, data.empty and data.overlong, or remove this source",
            )
        if not count:
            raise InputError(
                f"with this setting none of an epoch's {sum(counts)} rows comes from {source.path}",
                where=where,
                fix="raise it, or remove this source",
            )
    return counts


def _mixed_by(source: SourceSpec) -> str:
    return "epochs" if source.epochs is not None else "weight"


def mixture_weights(spec: DataSpec, sources: Sequence[SourceSpec], rows: Sequence[int]) -> list[float]:
    """The weight of each source, given or drawn from the sizes by the temperature; empty when there is neither.

    With a temperature T, sources are drawn in proportion to rows^(1/T): 1 is as they are, more is nearer to equal.
    Source: Raffel et al. 2020 (T5), section 3.5.2, temperature-scaled mixing.

    Raises:
        InputError: when only some sources have a weight, or two of weight, epochs and temperature are given.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) != len(sources):
        raise InputError(
            "some sources have a weight and some have none",
            where="data.train",
            fix="give every source a weight, or none",
        )
    ways = {
        "weight": bool(given),
        "epochs": any(source.epochs is not None for source in sources),
        "temperature": spec.temperature is not None,
    }
    used = [name for name, there in ways.items() if there]
    if len(used) > 1:
        raise InputError(
            f"{used[0]} and {used[1]} both say how much is taken from a source",
            where="data.temperature" if used[1] == "temperature" else "data.train",
            fix="use one of weight, epochs and temperature",
        )
    if spec.temperature is not None:
        return [max(count, 1) ** (1 / spec.temperature) for count in rows[: len(sources)]]
    return given


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportions of ``weights`` that add up to ``total`` (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
