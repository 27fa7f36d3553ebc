"""The layers of LoRA: a frozen module with a low-rank update beside it, and how the two become one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.base import InputError
from tunesmith.methods.method import freeze, settle
from tunesmith.models.projection import LowRank, project_by, projection_of
from tunesmith.models.quantization_grid import Grid


class LoraLayer(nn.Module):
    """A frozen layer with a trained low-rank update beside it.

    Attributes:
        base: the frozen layer as it was found (plain, fused or quantized).
        lora_A: fp32 ``[rank, in_features]``; lora_B: fp32 ``[out_features, rank]``.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        grid: where the layer computes with base and update added and rounded to it, as the merged weight will be.
    """

    is_adapter: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.grid: Grid | None = None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        in_features, out_features = _features(base)
        device = cast(Tensor, base.weight).device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some architectures look at its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def low_rank(self) -> LowRank | None:
        """The update as plain tensors; None while dropout is part of it."""
        dropped = self.training and isinstance(self.dropout, nn.Dropout)
        grid = self.grid if self.scale else None  # without its update it is the base as it is
        return None if dropped else LowRank(self.lora_A, self.lora_B, self.scale, grid)

    def forward(self, hidden: Tensor) -> Tensor:
        projection = projection_of(self)
        if projection is not None:
            rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
            (output,) = project_by(rows, (projection,))
            return output.view(*hidden.shape[:-1], output.shape[-1])
        if self.grid is not None:
            raise InputError(
                "this layer cannot be rounded: something hooks into it, or it is no plain linear layer",
                where="method.quantization_aware",
                fix="choose other targets",
            )
        output = self.base(hidden)
        low_rank = F.linear(self.dropout(hidden), self.lora_A.to(hidden.dtype)) * self.scale  # [..., rank]
        update = low_rank.reshape(-1, low_rank.shape[-1])
        # One fused product and sum: a separate sum would pass over the whole output once more.
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), update, self.lora_B.to(output.dtype).T)
        return flat.view(output.shape)

    def is_seen(self) -> bool:
        """Whether the update is large enough to change a weight of the base's magnitude in fp32 (24 bits)."""
        with torch.no_grad():
            base = self.weight.abs().max().float() if self.weight.is_floating_point() else torch.tensor(1.0)
            largest = self.scale * len(self.lora_A) * self.lora_A.abs().max() * self.lora_B.abs().max()
            return bool(largest > 2.0**-24 * base.to(largest.device))

    def delta(self) -> Tensor:
        """The update of the weight in fp32, laid out as the base's weight."""
        update = (self.lora_B @ self.lora_A) * self.scale
        return update.T if isinstance(self.base, Conv1D) else update


class LoraEmbedding(LoraLayer):
    """LoRA of an embedding table: lora_A ``[rank, vocabulary]``, lora_B ``[dimension, rank]``, as PEFT has it."""

    suffixes: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank, scale, dropout)
        # PEFT starts an embedding's A at zero and B at random, so that only rows of seen tokens ever move.
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, hidden: Tensor) -> Tensor:
        token_ids = hidden
        output = self.base(token_ids)
        low_rank = F.embedding(token_ids, self.lora_A.T)  # [..., rank]
        scale = self.scale * getattr(self.base, "embed_scale", 1.0)  # Gemma scales what the table returns
        return output + (F.linear(low_rank, self.lora_B) * scale).to(output.dtype)

    def delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scale


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def wrap(model: nn.Module, name: str, rank: int, scale: float, dropout: float) -> None:
    """Puts a LoRA layer in the place of the module ``name``."""
    parent_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    layer = LoraEmbedding if isinstance(module, nn.Embedding) else LoraLayer
    wrapped = layer(module, rank, scale, dropout).train(module.training)
    setattr(model.get_submodule(parent_name), leaf, wrapped)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Runs the model as if its LoRA layers were not there."""
    layers = lora_layers(model)
    scales = {name: layer.scale for name, layer in layers.items()}
    for layer in layers.values():
        layer.scale = 0.0
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.scale = scales[name]


def merge_lora(model: nn.Module) -> int:
    """Folds every LoRA layer into the weight beside it and puts the plain layer back.

    A weight that another module shares (a tied head) is first given a copy of its own, so that only the adapted
    module changes. Weights that were trained whole in fp32 return to the dtype of the model. Quantized weights cannot
    take an update; merge into the unquantized base instead.

    Returns:
        Number of layers merged.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise InputError(f"{name} is quantized and cannot take a merged update", where="model.quantize")
    with torch.no_grad():
        for name, layer in layers.items():
            base = layer.base
            weight = cast(nn.Parameter, base.weight)
            if len(names_of(model, weight)) > 1:
                weight = untie(model, f"{name}.base.weight")
            weight.copy_(weight.float() + layer.delta())
            parent_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent_name), leaf, base)
    settle(model)
    freeze(model)
    return len(layers)


def _features(base: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer; vocabulary and dimension of an embedding."""
    if isinstance(base, Conv1D):
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    linear = cast(nn.Linear, base)
    return linear.in_features, linear.out_features


def untie(model: nn.Module, name: str) -> nn.Parameter:
    """Gives a module a copy of a weight that it shared with another one, and returns it."""
    parent_name, _, leaf = name.rpartition(".")
    shared = model.get_parameter(name)
    own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    setattr(model.get_submodule(parent_name), leaf, own)
    cast(Any, model).config.tie_word_embeddings = False
    return own


def names_of(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """All names of a parameter: several when modules share it."""
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
