"""Token sequences laid end to end so that what several of them begin with stands there once.

A radix tree (Morrison 1968, "PATRICIA"): its nodes are the segments of a `Batch`, which attend to their ancestors. The
five worked examples of a benchmark are then computed once for all of its questions, and a question once for all of its
answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.batch import NO_PARENT, Batch

SHORTEST = 16
"""Tokens that two sequences must share for a segment of their own: splitting rows further costs more than it saves."""

Ids = NDArray[np.uint32]


@dataclass(frozen=True)
class Tree:
    """Sequences as segments.

    Attributes:
        batch: their tokens, each shared beginning once.
        places: for each sequence where its tokens stand in the batch, int64 ``[length]``.
    """

    batch: Batch
    places: list[Tensor]


class Sequences:
    """Token sequences in the order in which neighbours share most.

    Attributes:
        ids: of every sequence, in the order given.
        order: their numbers, sorted by their tokens.
        shared: for each of ``order`` but the last how many tokens it has in common with the next.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.ids: list[Ids] = [np.asarray(sequence, dtype=np.uint32) for sequence in sequences]
        # Bytes of big-endian numbers sort as the numbers do, and compare at the speed of memory.
        keys = [ids.astype(">u4").tobytes() for ids in self.ids]
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.shared = [
            _common(self.ids[one], self.ids[other]) for one, other in zip(self.order, self.order[1:], strict=False)
        ]

    def groups(self, most: int) -> list[list[int]]:
        """Numbers of the sequences of each batch of at most ``most`` tokens, the longest first; those that share
        stand together, and a sequence that is longer is alone."""
        families = [[self.order[at] for at in range(*part)] for part in self.split(0, len(self.order), 0)]
        place = {number: at for at, number in enumerate(self.order)}
        pieces = [piece for family in families for piece in self._pieces(family, place, most)]
        pieces.sort(key=lambda piece: -max(len(self.ids[number]) for number in piece[0]))
        groups: list[list[int]] = []
        tokens = most + 1
        for piece, size in pieces:
            if tokens + size > most:
                groups.append([])
                tokens = 0
            groups[-1] += piece
            tokens += size
        return groups

    def _pieces(self, family: list[int], place: dict[int, int], most: int) -> Iterator[tuple[list[int], int]]:
        """A family in parts that fit, each with its tokens."""
        piece: list[int] = []
        tokens = 0
        for number in family:
            length = len(self.ids[number])
            common = self.shared[place[number] - 1] if piece else 0
            own = length - (common if common >= SHORTEST else 0)
            if piece and tokens + own > most:
                yield piece, tokens
                piece, tokens, own = [], 0, length
            piece.append(number)
            tokens += own
        yield piece, tokens

    def split(self, first: int, last: int, depth: int) -> list[tuple[int, int]]:
        """Parts of the sorted sequences in which neighbours share enough beyond ``depth`` tokens."""
        cuts = [at + 1 for at in range(first, last - 1) if self.shared[at] < depth + SHORTEST]
        return list(zip([first, *cuts], [*cuts, last], strict=True)) if last > first else []


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def laid_out(sequences: Sequence[Sequence[int]]) -> Tree:
    """The tree of sequences, at least one, of at least one token each."""
    return _Growing(Sequences(sequences)).tree()


class _Growing:
    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.tokens: list[Ids] = []
        self.segments: list[tuple[int, int, int]] = []
        self.positions: list[Tensor] = []
        self.places: dict[int, Tensor] = {}

    def tree(self) -> Tree:
        order = self.sequences.order
        for first, last in self.sequences.split(0, len(order), 0):
            self.grow(first, last, torch.zeros(0, dtype=torch.long), NO_PARENT)
        token_ids = torch.from_numpy(np.concatenate(self.tokens).astype(np.int64))
        batch = Batch(token_ids, torch.cat(self.positions), torch.tensor(self.segments), {}, {})
        return Tree(batch, [self.places[number] for number in range(len(order))])

    def grow(self, first: int, last: int, path: Tensor, parent: int) -> None:
        """Lays out the sorted sequences ``first … last``, whose tokens up to ``path`` are there already."""
        ids, depth = self.sequences.ids[self.sequences.order[first]], len(path)
        common = len(ids) if last - first == 1 else min(self.sequences.shared[first : last - 1])
        if common > depth:
            start = self.segments[-1][0] + self.segments[-1][1] if self.segments else 0
            self.tokens.append(ids[depth:common])
            self.positions.append(torch.arange(depth, common))
            self.segments.append((start, common - depth, parent))
            parent, path = len(self.segments) - 1, torch.cat([path, torch.arange(start, start + common - depth)])
        while first < last and len(self.sequences.ids[self.sequences.order[first]]) == len(path):
            self.places[self.sequences.order[first]] = path
            first += 1
        for part in self.sequences.split(first, last, len(path)):
            self.grow(*part, path, parent)
