"""Attention of new tokens, laid end to end, to the cached tokens of their own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.batch import NO_PARENT
from tunesmith.engine.cache import Cache
from tunesmith.models.attention import attend

FEW = 16
"""New tokens up to which rows with different numbers of them are padded and run together."""
RAGGED = 1.25
"""How many times longer than the shortest piece of a group the longest may be, when they are longer than that."""


@dataclass(frozen=True)
class Piece:
    """New tokens of one row: the slot of the row, how many of its tokens are cached, and how many are new."""

    slot: int
    start: int
    count: int


class StepAttention:
    """Attention of one forward pass.

    Pieces that begin a row attend to themselves by the way that training has; all others to the cache, several rows
    at once, padded to the longest piece among them.

    Args:
        pieces: in the order of their tokens. `in_order` gives the one in which few groups cover them.
        scaling: of the scores.
        windows: for each layer how many tokens a query sees, itself among them; None for all.
    """

    def __init__(self, cache: Cache, pieces: Sequence[Piece], scaling: float, windows: Sequence[int | None]) -> None:
        self._cache, self._scaling, self._windows = cache, scaling, windows
        cache.reserve(max(piece.start + piece.count for piece in pieces))
        self._places = cache.places(
            [piece.slot for piece in pieces], [piece.start for piece in pieces], [piece.count for piece in pieces]
        )
        self._groups: list[_Rows | _Beginnings] = []
        first = 0
        for group in _grouped(pieces):
            kind = _Beginnings if _begins(group[0]) else _Rows
            self._groups.append(kind(group, first))
            first += sum(piece.count for piece in group)

    def to(self, device: torch.device) -> StepAttention:
        self._places = self._places.to(device)
        return self

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[tokens, heads * head_dim]`` from the layer's ``[tokens, heads, head_dim]``; keys and values are kept.

        Tokens behind those of the pieces attend to nothing and are not kept.
        """
        real, filler = len(self._places), len(query) - len(self._places)
        query, key, value = query[:real], key[:real], value[:real]
        self._cache.write(layer, self._places, key, value)
        found = []
        for group in self._groups:
            if isinstance(group, _Beginnings):
                found.append(group.attend(query, key, value, self._scaling, self._windows[layer]))
            else:
                keys, values = self._cache.read(layer, group.slots, group.reach)
                found.append(group.attend(query, keys, values, self._scaling, self._windows[layer]))
        if filler:
            found.append(found[0].new_zeros(filler, found[0].shape[1]))
        return found[0] if len(found) == 1 else torch.cat(found)


def in_order(pieces: Sequence[Piece]) -> list[int]:
    """Indices of ``pieces``: short ones by their slots, beginnings of rows, then the rest by length."""
    kinds = {at: (2 if piece.count > FEW else 0) - _begins(piece) for at, piece in enumerate(pieces)}
    return sorted(kinds, key=lambda at: (kinds[at], pieces[at].count if kinds[at] == 2 else pieces[at].slot))


def _begins(piece: Piece) -> bool:
    return piece.start == 0 and piece.count > FEW


def _grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    for piece in pieces:
        if groups:
            other = groups[-1][0]
            alike = _begins(piece) == _begins(other) and (piece.count > FEW) == (other.count > FEW)
            if alike and (_begins(piece) or piece.count <= max(FEW, RAGGED * other.count)):
                groups[-1].append(piece)
                continue
        groups.append([piece])
    return groups


class _Beginnings:
    """Whole beginnings of rows, which no cached token precedes."""

    def __init__(self, pieces: Sequence[Piece], first: int) -> None:
        counts = torch.tensor([piece.count for piece in pieces])
        self._tokens = slice(first, first + int(counts.sum()))
        self._segments = torch.stack([counts.cumsum(0) - counts, counts, torch.full_like(counts, NO_PARENT)], dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        tokens = self._tokens
        return attend(query[tokens], key[tokens], value[tokens], self._segments, scaling, window)


@dataclass
class _Rows:
    """Pieces that attend to the cache. Slots between theirs take part with a query that nobody reads."""

    pieces: Sequence[Piece]
    first: int
    slots: Sequence[int] = field(init=False)
    reach: int = field(init=False)

    def __post_init__(self) -> None:
        slots = [piece.slot for piece in self.pieces]
        beside = range(min(slots), max(slots) + 1)
        self.slots = beside if self.pieces[0].count <= FEW and len(beside) <= 2 * len(slots) else slots
        self.reach = max(piece.start + piece.count for piece in self.pieces)
        self._width = max(piece.count for piece in self.pieces)
        self._positions = torch.zeros(len(self.slots), self._width, dtype=torch.long)
        self._taken = torch.zeros(len(self.slots), self._width, dtype=torch.long)
        self._real: list[int] = []
        token = 0
        for piece in self.pieces:
            row = self.slots.index(piece.slot)
            self._positions[row, : piece.count] = torch.arange(piece.start, piece.start + piece.count)
            self._taken[row, : piece.count] = torch.arange(token, token + piece.count)
            self._real += range(row * self._width, row * self._width + piece.count)
            token += piece.count
        self._tokens = slice(self.first, self.first + token)
        self._whole = self._real == list(range(len(self.slots) * self._width))
        self._biases: dict[tuple[int | None, int], Tensor | None] = {}
        self._indices: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
        """``[tokens, heads * head_dim]`` from packed queries and keys ``[slots, reach, key_heads, head_dim]``."""
        if self._indices is None:
            self._indices = self._taken.flatten().to(query.device), torch.tensor(self._real).to(query.device)
        packed = query[self._tokens].contiguous()  # torch's fused kernel takes no transposed heads
        padded = packed if self._whole else packed.index_select(0, self._indices[0])
        output = self._padded(padded, keys.transpose(1, 2), values.transpose(1, 2), scaling, window)
        return output if self._whole else output.index_select(0, self._indices[1])

    def _padded(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
        rows, width, heads, key_heads = len(self.slots), self._width, query.shape[1], keys.shape[1]
        share = heads // key_heads
        if share == 1 or width == 1 or width > FEW:
            found = F.scaled_dot_product_attention(
                query.view(rows, width, heads, -1).transpose(1, 2),
                keys,
                values,
                attn_mask=self._bias(window, 1, query),
                scale=scaling,
                enable_gqa=share > 1,
            )
            return found.transpose(1, 2).reshape(rows * width, -1)
        # Queries of one key head side by side: its keys are read once for all of them.
        beside = query.view(rows, width, key_heads, share, -1).permute(0, 2, 3, 1, 4)
        found = F.scaled_dot_product_attention(
            beside.reshape(rows, key_heads, share * width, -1),
            keys,
            values,
            attn_mask=self._bias(window, share, query),
            scale=scaling,
        )
        apart = found.view(rows, key_heads, share, width, -1).permute(0, 3, 1, 2, 4)
        return apart.reshape(rows * width, -1)

    def _bias(self, window: int | None, share: int, query: Tensor) -> Tensor | None:
        """0 where a query looks and -inf elsewhere, ``[slots, 1, share * width, reach]``; None without the latter."""
        if (window, share) not in self._biases:
            positions = self._positions[:, :, None]
            keys = torch.arange(self.reach)
            allowed = keys <= positions
            if window is not None:
                allowed &= keys > positions - window
            bias = None
            if not bool(allowed.all()):
                allowed = allowed.repeat(1, share, 1)
                bias = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill_(~allowed, float("-inf"))
                bias = bias[:, None].to(query.device)
            self._biases[window, share] = bias
        return self._biases[window, share]
