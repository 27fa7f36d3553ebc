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
    """

    token_ids: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    source: Source | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on."""
        return int((self.tensors["target_weights"] > 0).sum())


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

    def to(self, device: torch.device) -> Batch:
        """Moves everything but ``segments``, which steers loops on the host."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            tensors={name: tensor.to(device) for name, tensor in self.tensors.items()},
        )


def pack(examples: Sequence[Example], layout: Literal["packed", "padded"] = "packed") -> Batch:
    """Lays ``examples`` end to end, one root segment each.

    Raises:
        ValueError: when ``examples`` is empty or the rows do not carry the same named tensors.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    names = examples[0].tensors.keys()
    if any(example.tensors.keys() != names for example in examples):
        raise ValueError("all examples of a batch must carry the same named tensors")
    lengths = torch.tensor([len(example) for example in examples])
    starts = torch.cumsum(lengths, 0) - lengths
    return Batch(
        token_ids=torch.cat([example.token_ids for example in examples]),
        positions=torch.cat([torch.arange(len(example)) for example in examples]),
        segments=torch.stack([starts, lengths, torch.full_like(starts, NO_PARENT)], dim=1),
        tensors={name: torch.cat([example.tensors[name] for example in examples]) for name in names},
        scopes=dict(examples[0].scopes),
        layout=layout,
    )
