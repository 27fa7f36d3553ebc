"""The one row type of every objective (`Example`) and the one layout of every forward pass (`Batch`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

    @property
    def reach(self) -> int:
        """Positions that a model needs for it: its length where nothing is shared."""
        return len(self) if self.segments is None else int(self.positions().max()) + 1

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

        For models that cannot pack. Targets keep their order, and stand in no segment that has children; tensors that
        count rows go to the first one.
        """
        if self.segments is None:
            return [self]
        segments = self.segments.tolist()
        leaves = sorted(set(range(len(segments))) - {parent for _, _, parent in segments})
        names: dict[Scope, list[str]] = {scope: [] for scope in ("token", "segment", "row", "target")}
        for name in self.tensors:
            names[self.scopes[name]].append(name)
        found, targets = list[Example](), 0
        for leaf in leaves:
            family = [leaf]
            while segments[family[0]][2] != NO_PARENT:
                family.insert(0, segments[family[0]][2])
            places = torch.cat([torch.arange(segments[at][0], segments[at][0] + segments[at][1]) for at in family])
            tensors = {name: self.tensors[name][places] for name in names["token"]}
            own = int((tensors["target_weights"] > 0).sum())
            tensors |= {name: self.tensors[name][targets : targets + own] for name in names["target"]}
            tensors |= {name: self.tensors[name][leaf : leaf + 1] for name in names["segment"]}
            tensors |= {name: self.tensors[name][: 0 if found else None] for name in names["row"]}
            targets += own
            found.append(Example(self.token_ids[places], tensors, self.scopes, self.source))
        return found


def answers_behind(prompt: int, other: int, length: int) -> Tensor:
    """Segments of a row of ``length`` tokens: a prompt, and behind it two answers, the second one from ``other`` on."""
    return torch.tensor([[0, prompt, NO_PARENT], [prompt, other - prompt, 0], [other, length - other, 0]])


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


def without_segments(batch: Batch, left_out: Collection[int]) -> Batch:
    """The batch without some segments, which must be nobody's parents; tensors that count rows stay as they are."""
    if not left_out:
        return batch
    kept, number, start = list[list[int]](), dict[int, int](), 0
    pieces = []
    for at, (begin, length, parent) in enumerate(batch.segments.tolist()):
        if at in left_out:
            continue
        number[at] = len(kept)
        kept.append([start, length, number.get(parent, NO_PARENT)])
        pieces.append(torch.arange(begin, begin + length))
        start += length
    device = batch.token_ids.device
    places = torch.cat(pieces).to(device)
    there = torch.zeros(batch.tokens, dtype=torch.bool, device=device).index_fill_(0, places, True)
    targets = there[batch.tensors["target_weights"] > 0]
    chosen = {"token": places, "target": torch.nonzero(targets).squeeze(1)}
    tensors = {
        name: tensor[chosen[scope]] if (scope := batch.scopes[name]) in chosen else tensor
        for name, tensor in batch.tensors.items()
    }
    return replace(
        batch,
        token_ids=batch.token_ids[places],
        positions=batch.positions[places],
        segments=torch.tensor(kept),
        tensors=tensors,
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
