"""What LoRA has to do with quantization: over a quantized base, started from what quantizing took away, or trained
through the rounding that its merged weights will meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.base import InputError
from tunesmith.methods.low_rank import LoraEmbedding, LoraLayer, lora_layers
from tunesmith.methods.targets import linear_modules, output_head_name
from tunesmith.models.quantization_grid import BLOCK, Grid
from tunesmith.models.quantized import PackedWeight, Quantization, packed_weight, quantization, stored_quantization
from tunesmith.models.stored_weights import StoredWeights

NEED_THE_WEIGHT = ("pissa", "olora")
OVERSAMPLED = 2
"""How many times the rank the random subspace of the decomposition has (Halko et al. 2011, section 4.2)."""


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def refuse_start(model: nn.Module, init: str, dora: bool) -> None:
    """Raises InputError for a start that this base does not allow."""
    if init in NEED_THE_WEIGHT and is_quantized(model):
        raise InputError(
            f"{init} takes a part off the base's weights, and quantized ones cannot take it",
            where="method.init",
            fix="use init: loftq, which starts from what quantizing took away, or remove model.quantize",
        )
    if init == "loftq" and not is_quantized(model):
        raise InputError(
            "loftq starts from what quantizing took away, and the base is not quantized",
            where="method.init",
            fix="set model.quantize: nf4, or use another init",
        )
    if init == "loftq" and dora:
        raise InputError(
            "loftq makes up for what quantizing took off a sum, and DoRA rescales that sum",
            where="method.init",
            fix="leave one of them out",
        )


def start_by_loftq(model: nn.Module) -> None:
    """Starts every layer at the best low-rank approximation of W - Q(W), so that quantized base and adapter together
    are close to the base as it was (LoftQ, Li et al. 2023, equation 6, one step).

    The base stays Q(W), as anybody quantizes it. Further steps, ``Q(W - scale B A)``, would come closer, but change
    the base, to one that belongs to this adapter alone and had to be kept with it.

    Raises:
        InputError: when a base layer is not in 4 bits, or its weight is not found in the model's files.
    """
    layers = {name: layer for name, layer in lora_layers(model).items() if not layer.weight.is_meta}
    if not layers:
        return
    stored = StoredWeights(str(cast(Any, model).config.name_or_path))
    for name, layer in layers.items():
        packed = packed_weight(layer.base)
        if packed is None:
            raise InputError(
                f"{name} is not stored in 4 bits, and loftq starts from what that takes away",
                where="method.init",
                fix="set model.quantize: nf4 or fp4, and target linear layers",
            )
        whole = stored.read(f"{name}.weight")
        if getattr(layer.base, "source_cls", None) is Conv1D:
            whole = whole.t()
        _start_at(layer, whole, packed)


def _start_at(layer: LoraLayer, whole: Tensor, packed: PackedWeight) -> None:
    with torch.no_grad():
        rank = len(layer.lora_A)
        lost = whole.to(layer.lora_A.device, torch.float32) - packed.to(torch.float32)  # [out, in]
        kept = min(OVERSAMPLED * rank, *lost.shape)
        left, sizes, right = torch.svd_lowrank(lost, q=kept, niter=4)
        root = (sizes[:rank] / layer.scale).sqrt()
        layer.lora_A[: len(root)] = (right[:, :rank] * root).t()
        layer.lora_B[:, : len(root)] = left[:, :rank] * root
        layer.lora_B[:, len(root) :] = 0


def round_to(model: nn.Module, name: str) -> list[str]:
    """Lets every LoRA layer compute with its merged weight rounded to a 4-bit grid; returns what stays unrounded.

    Raises:
        InputError: when the base is quantized already, or a target is no linear layer.
    """
    if is_quantized(model):
        raise InputError(
            "quantization-aware training rounds base and adapter together, and needs the base unrounded",
            where="method.quantization_aware",
            fix="remove model.quantize",
        )
    grid = Grid(cast(Any, name))
    layers = lora_layers(model)
    for layer in layers.values():
        if isinstance(layer, LoraEmbedding):
            raise InputError(
                "quantization-aware training rounds linear layers only",
                where="method.targets",
                fix="leave embeddings out of the targets",
            )
        layer.grid = grid if grid.takes(layer.lora_A.shape[1]) else None
    narrow = [name for name, layer in layers.items() if layer.grid is None]
    adapted = tuple(f"{name}." for name in layers)
    head = output_head_name(model)
    others = [other for other in linear_modules(model) if other != head and not f"{other}.".startswith(adapted)]
    return [
        *_note(narrow, f"have rows that blocks of {BLOCK[grid.name]} do not fit, and are not rounded to {grid.name}"),
        *_note(others, f"get no adapter, and are not rounded to {grid.name} while it trains"),
    ]


def _note(names: Iterable[str], what: str) -> list[str]:
    found = list(names)
    return [f"{len(found)} linear layers (first: {found[0]}) {what}"] if found else []


@dataclass(frozen=True)
class Base:
    """What an adapter was trained over.

    Attributes:
        quantized: how the base's weights were held; None when they were not quantized, or the file does not say.
        bound: whether the adapter makes up for that rounding, and so belongs on the rounded base alone (LoftQ).
    """

    quantized: Quantization | None = None
    bound: bool = False


def base_written(model: nn.Module, *, bound: bool) -> dict[str, str]:
    """What is said of the base in the header of an adapter's file, which PEFT passes over."""
    held = stored_quantization(cast(Any, model).config)
    if held is None:
        return {}
    said = {"base_quantize": held.kind, "base_double_quantization": str(held.double).lower()}
    return {**said, "base_bound": str(bound).lower()}


def base_read(directory: Path) -> Base:
    """What the adapter in ``directory`` says of its base.

    Raises:
        InputError: when its file cannot be read.
    """
    path = directory / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as opened:
            said: dict[str, str] = cast(Any, opened).metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the adapter's weights: {error}", where=path) from error
    held = quantization(said.get("base_quantize", "none"), said.get("base_double_quantization") == "true")
    return Base(held, said.get("base_bound") == "true")
