"""Bytes by component, computed from the shapes of the model and the method.

Conventions: Adam keeps two fp32 states (8 bytes a trained weight); trained weights and their gradients are fp32;
frozen weights have the dtype of `model.dtype`, or 4 or 8 bits and their constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from tunesmith.methods import trainable_parameters
from tunesmith.methods.targets import linear_modules, output_head_name
from tunesmith.models.measure import Shape
from tunesmith.models.quantized import Quantization, settled_quantization
from tunesmith.recipe import Memory, Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256), "paged-adamw-8bit": 2 * (1 + 4 / 256)}
RUNTIME_BYTES = 520 * 2**20
"""Resident memory of the interpreter with torch, transformers and datasets imported and their kernels warmed up."""


def quantized_bytes(held: Quantization) -> float:
    """Bytes a weight of a linear layer: 4 bits with one fp32 scale for 64 weights (0.5 bits), or 0.127 bits when scales
    are quantized too (Dettmers et al. 2023, section 3); 8 bits with one scale a row."""
    if held.kind == "int8":
        return 1.0 + 4 / 512
    return 0.5 + (0.127 if held.double else 0.5) / 8


@dataclass(frozen=True)
class Load:
    """The largest micro-batch.

    Attributes:
        tokens: of the micro-batch.
        targets: of those, how many have logits.
        checkpointing: whether activations are recomputed.
        dtype: of the arithmetic.
        runtime: whether the interpreter's own memory counts.
    """

    tokens: int
    targets: int
    checkpointing: bool
    dtype: str
    runtime: bool


def predict_memory(model: nn.Module, shape: Shape, recipe: Recipe, frozen_dtype: str, load: Load) -> Memory:
    """Bytes that training needs at its peak, by component.

    Args:
        model: adapted by the recipe's method, on the meta device or any other.
    """
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    quantized, held = 0, settled_quantization(recipe.model.quantization, model.config, recipe.model.path)
    if held is not None:
        head = output_head_name(model)
        linears = linear_modules(model)
        quantized = sum(cast(Tensor, linears[name].weight).numel() for name in linears if name != head)
    weights = (4 if recipe.train.ema == "off" else 8) * trained + BYTES[frozen_dtype] * (frozen - quantized)
    weights += 0 if held is None else quantized * quantized_bytes(held)
    gradients = 4 * trained
    optimizer = OPTIMIZER_BYTES[recipe.train.optimizer] * trained
    activations = activation_bytes(shape, load)
    if recipe.method.trains_all and load.dtype != "fp32":
        activations += BYTES[load.dtype] * (shape.linear_weights + shape.head_weights)  # copies that autocast keeps
    runtime = RUNTIME_BYTES if load.runtime else 0
    total = weights + gradients + optimizer + activations + runtime
    return Memory(
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int(optimizer),
        activations=int(activations),
        runtime=runtime,
        peak_bytes=int(total),
    )


def activation_bytes(shape: Shape, load: Load) -> float:
    """What the forward pass keeps for the backward pass, and the logits of the targets.

    Per token and block: every linear layer's output, the two products inside a gated feed-forward part, queries, keys
    and values once more after rotation, and each norm's fp32 working copies.
    """
    width = BYTES[load.dtype]
    beside = 2 * shape.intermediate + 3 * shape.hidden + shape.key_value
    whole = width * (shape.linear_outputs + shape.layers * beside) + shape.layers * 4 * 4 * shape.hidden
    if load.checkpointing:
        whole = width * shape.layers * shape.hidden + whole / max(1, shape.layers)
    # Logits in the model's dtype, once more in fp32 with their softmax, and the gradient of both.
    logits = load.targets * shape.vocabulary * (2 * width + 8)
    return load.tokens * whole + logits
