"""The one row type of every objective (`Example`) and the one layout of every forward pass (`Batch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tunesmith.base import Source

Scope = Literal["token", "segment", "row", "target"]
"""What the first dimension of a named tensor counts."""

NO_PARENT = -1


@dataclass(frozen=True)
class Example:
    """One row ready for a model.

    Attributes:
        token_ids: int64 ``[length]``.
        tensors: named tensors; ``target_weights`` is float32 ``[length]``: how much predicting token *i* from the
            tokens before it counts in the loss. The first entry is always 0.
        scopes: for each named tensor what its first dimension counts.
        source: file and line.
        segments: int64 ``[segments, 3]`` as in `Batch`, counted within the row; None for one that holds all tokens.
    """

    token_ids: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    source: Source | None = None
    segments: Tensor | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on."""
        return int((self.tensors["target_weights"] > 0).sum())

    def own_segments(self) -> Tensor:
        """Its segments, int64 ``[segments, 3]``."""
        return torch.tensor([[0, len(self), NO_PARENT]]) if self.segments is None else self.segments

    def positions(self) -> Tensor:
        """int64 ``[length]``, counted from 0; a segment goes on where its parent ended."""
        if self.segments is None:
            return torch.arange(len(self))
        ends: list[int] = []
        pieces = []
        for _, length, parent in self.segments.tolist():
            start = 0 if parent == NO_PARENT else ends[parent]
            ends.append(start + length)
            pieces.append(torch.arange(start, ends[-1]))
        return torch.cat(pieces)

    def apart(self) -> list[Example]:
        """A row for each segment that is nobody's parent, behind copies of its ancestors, in which nothing is a target.

        For models that cannot pack. Targets keep their order; tensors that count something else than tokens go to the
        first of the rows.
        """
        if self.segments is None:
            return [self]
        segments = self.segments.tolist()
        leaves = sorted(set(range(len(segments))) - {parent for _, _, parent in segments})
        token_scoped = [name for name in self.tensors if self.scopes[name] == "token"]
        found = []
        for leaf in leaves:
            family = [leaf]
            while segments[family[0]][2] != NO_PARENT:
                family.insert(0, segments[family[0]][2])
            places = torch.cat([torch.arange(segments[at][0], segments[at][0] + segments[at][1]) for at in family])
            tensors = {name: self.tensors[name][places] for name in token_scoped}
            for name in self.tensors.keys() - tensors.keys():
                tensors[name] = self.tensors[name][:0] if found else self.tensors[name]
            found.append(Example(self.token_ids[places], tensors, self.scopes, self.source))
        return found


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end in one sequence.

    Attributes:
        token_ids: int64 ``[tokens]``.
        positions: int64 ``[tokens]``, counted from 0 in each row (a child segment goes on where its parent ended).
        segments: int64 ``[segments, 3]`` on the CPU: start, length, parent (index of a segment, or -1). A segment
            attends causally to itself and wholly to its ancestors, and to nothing else.
        tensors: named tensors, concatenated over rows along their first dimension.
        scopes: what the first dimension of each named tensor counts.
        layout: ``packed`` runs the sequence as it stands; ``padded`` gives every segment a row of its own, for models
            whose layers mix tokens in ways that segments cannot separate.
        filler: runs only so that every process runs as often as the others; nothing in it is trained on.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Tensor
    tensors: dict[str, Tensor]
    scopes: dict[str, Scope]
    layout: Literal["packed", "padded"] = "packed"
    filler: bool = False

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def rows(self) -> int:
        return int((self.segments[:, 2] == NO_PARENT).sum())

    def before(self, places: Tensor) -> Tensor:
        """Where the token before each of ``places`` stands: int64 ``[n]``, on the device of ``places``.

        What opens a child follows its parent's last token. A token that opens a root has nothing before it.
        """
        opening = {int(start): int(parent) for start, _, parent in self.segments.tolist() if parent != NO_PARENT}
        if not opening:
            return places - 1
        ends = (self.segments[:, 0] + self.segments[:, 1] - 1).tolist()
        jumps = torch.arange(-1, self.tokens - 1)
        for start, parent in opening.items():
            jumps[start] = ends[parent]
        return jumps.to(places.device)[places]

    def to(self, device: torch.device) -> Batch:
        """Moves everything but ``segments``, which steers loops on the host."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
        )


def pack(examples: Sequence[Example], layout: Literal["packed", "padded"] = "packed") -> Batch:
    """Lays ``examples`` end to end, their segments one after the other; in the padded layout nothing is shared.

    Raises:
        ValueError: when ``examples`` is empty or the rows do not carry the same named tensors.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    names = examples[0].tensors.keys()
    if any(example.tensors.keys() != names for example in examples):
        raise ValueError("all examples of a batch must carry the same named tensors")
    if layout == "padded":
        examples = [part for example in examples for part in example.apart()]
    return Batch(
        token_ids=torch.cat([example.token_ids for example in examples]),
        positions=torch.cat([example.positions() for example in examples]),
        segments=_laid_out(examples),
        tensors={name: torch.cat([example.tensors[name] for example in examples]) for name in names},
        scopes=dict(examples[0].scopes),
        layout=layout,
    )


def _laid_out(examples: Sequence[Example]) -> Tensor:
    """Segments of all examples, counted within the batch."""
    found, tokens, count = [], 0, 0
    for example in examples:
        own = example.own_segments().clone()
        own[:, 0] += tokens
        own[:, 2] += torch.where(own[:, 2] == NO_PARENT, 0, count)
        found.append(own)
        tokens += len(example)
        count += len(own)
    return torch.cat(found)
