"""Full fine-tuning: the model's own weights are trained, all of them or some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from tunesmith.base import InputError, nearest
from tunesmith.methods.method import (
    AdaptationMethod,
    freeze,
    make_trainable,
    task_head_tensors,
    train_in_fp32,
    train_task_head,
    trainable_parameters,
)
from tunesmith.methods.targets import compile_pattern, matches

PARTS = ("biases", "norms", "embeddings")


class Full(AdaptationMethod):
    """Weights of the model itself are trained, held in fp32; lower precision is used for the arithmetic only."""

    kind: Literal["full"] = "full"
    """Train the model's own weights."""
    weights: str | list[str] = "all"
    """`all`; `biases` (BitFit, Ben Zaken et al. 2022), `norms` or `embeddings`; or regular expressions over names of
    weights (a whole name or its last components). The rest is frozen."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate from each block to the one below (Howard & Ruder 2018, section 3.2, discriminative
    fine-tuning); 0.8 to 0.95 spares the lower blocks."""

    saved_as: ClassVar[str] = "model"
    default_learning_rate: ClassVar[float] = 2e-5

    @property
    def needs_autocast(self) -> bool:
        return True

    @property
    def trains_all(self) -> bool:
        return self.weights == "all"

    def adapt(self, model: nn.Module) -> list[str]:
        if getattr(model, "is_quantized", False):
            raise InputError(
                "quantized weights cannot be trained whole",
                where="model.quantize",
                fix="remove model.quantize, or use method.kind: lora",
            )
        if self.trains_all:
            for parameter in model.parameters():
                make_trainable(parameter)
            return []
        chosen = self._chosen(model)
        freeze(model)
        heads = {id(parameter) for parameter in task_head_tensors(model).values()}
        train_in_fp32(model, [parameter for parameter in chosen if id(parameter) not in heads])
        train_task_head(model)
        return []

    def _chosen(self, model: nn.Module) -> list[nn.Parameter]:
        if isinstance(self.weights, str) and self.weights in PARTS:
            found = _part(model, self.weights)
            if not found:
                raise InputError(
                    f"this model has no {self.weights}", where="method.weights", fix="choose other weights"
                )
            return list(found.values())
        named = dict(model.named_parameters())
        chosen: dict[str, nn.Parameter] = {}
        for pattern in [self.weights] if isinstance(self.weights, str) else self.weights:
            compile_pattern(pattern, key="method.weights")
            found = {name: parameter for name, parameter in named.items() if matches(pattern, name)}
            if not found:
                last = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in named})
                raise InputError(
                    f"{pattern!r} matches no weight of this model{nearest(pattern, [*PARTS, 'all', *last])}",
                    where="method.weights",
                    fix=f"write all, {', '.join(PARTS)}, or expressions over names such as {', '.join(last[:6])}",
                )
            chosen |= found
        return list(chosen.values())

    def rates(self, model: nn.Module) -> dict[str, float]:
        if self.layer_decay == 1.0:
            return {}
        names = trainable_parameters(model)
        depths = {name: _depth(name) for name, _ in model.named_parameters()}
        blocks = 1 + max((depth for depth in depths.values() if depth is not None), default=-1)
        bottom = _part(model, "embeddings")
        return {name: self.layer_decay ** (blocks - _height(depths[name], name in bottom, blocks)) for name in names}

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        cast(Any, model).save_pretrained(directory, safe_serialization=True)

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(trainable_parameters(model))


def _part(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Parameters of a part of the model by name."""
    named = dict(model.named_parameters())
    if part == "biases":
        return {name: parameter for name, parameter in named.items() if name.endswith("bias")}
    wanted = {
        id(parameter)
        for module in model.modules()
        if (isinstance(module, nn.Embedding) if part == "embeddings" else "norm" in type(module).__name__.lower())
        for parameter in module.parameters(recurse=False)
    }
    return {name: parameter for name, parameter in named.items() if id(parameter) in wanted}


def _depth(name: str) -> int | None:
    """Number of the block that a weight belongs to."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def _height(depth: int | None, embedding: bool, blocks: int) -> int:
    """Blocks from the bottom: embeddings 0, the first block 1; what comes after the blocks is as high as the last."""
    if depth is not None:
        return depth + 1
    return 0 if embedding else blocks
