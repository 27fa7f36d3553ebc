"""Documents cut into pieces of at most a block and laid together into blocks, so that no token is lost or doubled.

A piece of a document is a segment of its own: it attends to no other document, nor to the pieces before it. The last
token of a piece is the first of the next, where it is context only; so each token of a document behind its first one
is a target exactly once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tunesmith.batch import NO_PARENT, Example
from tunesmith.data.render import Rendered
from tunesmith.data.stored import RenderedRows

PIECE = np.dtype([("row", "<i8"), ("start", "<i8"), ("length", "<i8")])
"""Place of the document among the rows, first token of the piece in it, and tokens of the piece."""


def pieces_of(lengths: np.ndarray, block: int) -> np.ndarray:
    """Every document in pieces of at most ``block`` tokens, array of ``PIECE``, in their order.

    Args:
        lengths: tokens of each document, the one before its first target included.

    Raises:
        ValueError: when a block has no room for a target behind its context.
    """
    if block < 2:
        raise ValueError("a block of one token has no target")
    counts = np.maximum(1, -(-(lengths - 1) // (block - 1)))
    rows = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros(len(rows), PIECE)
    found["row"], found["start"] = rows, number * (block - 1)
    found["length"] = np.minimum(block, lengths[rows] - found["start"])
    return found


def laid_together(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Numbers of pieces in each block, by best fit: the longest piece first, into the fullest block with room for it.

    No piece is cut again. Ding et al. 2024 ("Fewer Truncations Improve Language Modeling", algorithm 1) find that this
    fills blocks as well as cutting at every block's end, and that models trained so contradict their context less.

    Args:
        lengths: of the pieces, each at most ``block``.
    """
    blocks: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of with_room, ascending: at most `block` of them
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[at]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            blocks.append([at])
            number, room = len(blocks) - 1, block
        else:
            room = rooms[place]
            number = with_room[room].pop()
            blocks[number].append(at)
            if not with_room[room]:
                del with_room[room], rooms[place]
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                rooms.insert(bisect_left(rooms, left), left)
            with_room[left].append(number)
    return blocks


@dataclass(frozen=True)
class Laid:
    """Pieces in the order of the blocks they are in.

    Attributes:
        pieces: array of ``PIECE``.
        ends: int64 ``[blocks]``, how many pieces stand before the end of each block.
    """

    pieces: np.ndarray
    ends: np.ndarray

    def of(self, at: int) -> np.ndarray:
        return self.pieces[self.ends[at - 1] if at else 0 : self.ends[at]]


class Blocks(RenderedRows):
    """Rows that are blocks: pieces of documents, each a root segment.

    Attributes:
        numbers: int64 ``[pieces]``: the document of each piece; so a document stands there as often as it has pieces.
        lengths: int64 ``[blocks]``, tokens of each block.
        targets: int64 ``[blocks]``, tokens of each that are trained on.
        block: the most tokens of a piece.
    """

    def __init__(self, documents: RenderedRows, laid: Laid, block: int) -> None:
        super().__init__(documents.stored, documents.numbers[laid.pieces["row"]], None)
        self.limit, self.block, self._documents, self._laid = block, block, documents, laid
        starts = np.concatenate([np.zeros(1, np.int64), laid.ends[:-1]])
        self.lengths = np.add.reduceat(laid.pieces["length"], starts) if len(laid.ends) else laid.ends
        self.targets = self.lengths - np.diff(laid.ends, prepend=0)

    @classmethod
    def one_a_document(cls, documents: RenderedRows, block: int) -> Blocks:
        """Each document a row, for judging: it may be longer than a block, and its pieces are."""
        pieces = pieces_of(documents.lengths, block)
        return cls(documents, Laid(pieces, np.cumsum(np.bincount(pieces["row"], minlength=len(documents)))), block)

    @classmethod
    def filled(cls, documents: RenderedRows, origins: np.ndarray, block: int) -> tuple[Blocks, np.ndarray]:
        """Full blocks, in each of which all documents come from one source.

        Args:
            origins: int64 ``[documents]``, the source of each.

        Returns:
            The blocks, and the source of each: int64 ``[blocks]``.
        """
        pieces = pieces_of(documents.lengths, block)
        order, ends, sources = list[int](), list[int](), list[int]()
        for source in np.unique(origins):
            own = np.nonzero(origins[pieces["row"]] == source)[0]
            for members in laid_together(pieces["length"][own].tolist(), block):
                order += own[members].tolist()
                ends.append(len(order))
                sources.append(int(source))
        laid = Laid(pieces[order], np.array(ends, np.int64))
        return cls(documents, laid, block), np.array(sources, np.int64)

    def __len__(self) -> int:
        return len(self._laid.ends)

    @property
    def uncut(self) -> np.ndarray:
        return self.lengths

    @property
    def fill(self) -> float:
        """Share of the blocks' room that is used."""
        return float(self.lengths.sum() / (self.block * max(1, len(self))))

    def _own(self, at: int) -> Rendered:
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        pieces = self._laid.of(at % len(self))
        items = {int(row): self._documents[int(row)] for row in np.unique(pieces["row"])}
        ids, weights, segments, tokens = list[torch.Tensor](), list[torch.Tensor](), list[list[int]](), 0
        for row, start, length in pieces.tolist():
            example = items[row].example
            ids.append(example.token_ids[start : start + length])
            weights.append(example.tensors["target_weights"][start : start + length].clone())
            weights[-1][0] = 0.0
            segments.append([tokens, length, NO_PARENT])
            tokens += length
        first = items[int(pieces["row"][0])]
        example = Example(
            torch.cat(ids),
            {"target_weights": torch.cat(weights)},
            first.example.scopes,
            first.example.source,
            torch.tensor(segments) if len(segments) > 1 else None,
        )
        return replace(first, example=example)
