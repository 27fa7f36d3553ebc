"""Keys and values of past tokens, one slot for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """Keys and values of every layer, each ``[slots, capacity, key_heads, head_dim]``.

    What a slot holds at index *i* is of the token at position *i*. Memory is taken when the first keys come and
    doubles when a row outgrows it.

    Attributes:
        held: for each slot the tokens whose keys and values it holds; they stay readable after their row has ended.
    """

    def __init__(self, layers: int, slots: int, longest: int) -> None:
        """``longest`` is the number of tokens that no row will exceed."""
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self._longest, self._capacity = longest, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def reserve(self, tokens: int) -> None:
        """Makes room for rows of ``tokens`` tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = min(self._longest, max(tokens, 2 * self._capacity))
        for layer, stored in enumerate(self._layers):
            if stored is not None:
                self._layers[layer] = (self._grown(stored[0]), self._grown(stored[1]))

    def places(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Where tokens go that are laid end to end, int64 ``[tokens]`` on the CPU."""
        pieces = [
            torch.arange(start, start + count) + slot * self._capacity
            for slot, start, count in zip(slots, starts, counts, strict=True)
        ]
        return torch.cat(pieces)

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores ``[tokens, key_heads, head_dim]`` at ``places``."""
        for stored, new in zip(self._stored(layer, key, value), (key, value), strict=True):
            stored.view(-1, *stored.shape[2:]).index_copy_(0, places, new)

    def read(self, layer: int, slots: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[slots, tokens, key_heads, head_dim]``: views where the slots lie beside each other."""
        stored = self._layers[layer]
        if stored is None:
            raise ValueError("nothing was written yet")
        first, count = slots[0], len(slots)
        if list(slots) == list(range(first, first + count)):
            return stored[0][first : first + count, :tokens], stored[1][first : first + count, :tokens]
        index = torch.tensor(slots, device=stored[0].device)
        return stored[0][:, :tokens].index_select(0, index), stored[1][:, :tokens].index_select(0, index)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Gives ``target`` the first ``tokens`` tokens of ``source``."""
        self.held[target] = self.held[source][:tokens]
        if source == target:
            return
        for stored in self._layers:
            for tensor in stored or ():
                tensor[target, :tokens].copy_(tensor[source, :tokens])

    def shared(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of the beginning of ``tokens``, and how many tokens that is."""
        found = [common(held, tokens) for held in self.held]
        best = max(range(len(found)), key=found.__getitem__)
        return best, found[best]

    def _stored(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stored = self._layers[layer]
        if stored is None:
            slots = len(self.held)
            # Zeros, because what a mask hides must still be a number.
            stored = (
                key.new_zeros(slots, self._capacity, *key.shape[1:]),
                value.new_zeros(slots, self._capacity, *value.shape[1:]),
            )
            self._layers[layer] = stored
        return stored

    def _grown(self, stored: Tensor) -> Tensor:
        larger = stored.new_zeros(stored.shape[0], self._capacity, *stored.shape[2:])
        larger[:, : stored.shape[1]].copy_(stored)
        return larger


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
