"""What a job needs when the model is read block by block, and what such a job cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tunesmith.base import InputError
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.models.measure import Shape
from tunesmith.models.streamed import StreamedModel
from tunesmith.models.streamed_head import AT_ONCE, ROWS_AT_ONCE
from tunesmith.objectives import Supervised
from tunesmith.plan.memory import BYTES
from tunesmith.recipe import Recipe
from tunesmith.resolved import Memory

RUNTIME_BYTES = 362 * 10**6
"""Resident memory of a process that has imported what a streamed job needs, with tokenizer, rows and kernels."""
STEP = 64
"""Numbers of tokens at a time are multiples of this."""
MOST_AT_ONCE = 2048
SPREAD = 1.1
"""How much more than the average a step's tokens are taken to be, so that most steps need no pass more."""
MARGIN = 1.03
"""What is lost between pieces of memory."""
KEY = "budget.memory"


@dataclass(frozen=True)
class StreamedLoad:
    """A micro-batch of a streamed job: tokens, targets among them, dtypes of arithmetic and of weights in memory."""

    tokens: int
    targets: int
    dtype: str
    frozen_dtype: str


def may_stream(recipe: Recipe) -> bool:
    """Whether the recipe's method and objective can be trained beside a model that is read block by block."""
    method = recipe.method
    if not isinstance(method, Lora) or method.kind != "lora" or not isinstance(recipe.objective, Supervised):
        return False
    beside = method.dora or method.init != "kaiming" or method.modules_to_save or method.trainable_tokens is not None
    return not beside and method.quantization_aware == "none"


def refuse_what_cannot_stream(recipe: Recipe) -> None:
    """Raises InputError when the recipe asks for more than a model that is not in memory can do."""
    for where, wrong, why, instead in _wishes(recipe):
        if wrong:
            raise InputError(
                f"{KEY} is too small for the whole model, and {why}",
                where=where,
                fix=f"raise {KEY}, or use {instead}",
            )


def _wishes(recipe: Recipe) -> list[tuple[str, bool, str, str]]:
    """Key, whether it asks for too much, why, and what would do instead."""
    train, evaluate = recipe.train, recipe.evaluate
    smoothing = recipe.objective.label_smoothing if isinstance(recipe.objective, Supervised) else 0.0
    probed = evaluate != "off" and evaluate.memorisation not in ("auto", "off")
    metrics = [] if evaluate == "off" or evaluate.metrics == "auto" else evaluate.metric_names
    gated = [name for name in recipe.gate if name not in ("perplexity", "forgetting")]
    answers = "every token of an answer would read the whole model"
    again = "blocks that are read one at a time are computed again in the backward pass"
    library = "8-bit states come with a library that takes more memory than they save"
    return [
        ("method", not may_stream(recipe), "only plain LoRA that writes is trained so", "method.kind: lora alone"),
        ("model.quantize", recipe.model.quantize != "none", "a quantized one cannot be read block by block", "none"),
        ("model.add_tokens", bool(recipe.model.add_tokens), "its embeddings are not in memory", "no new tokens"),
        ("objective.label_smoothing", smoothing > 0, "its logits are never there at once", "0"),
        ("train.ema", train.ema != "off", "an average takes as much memory as the adapters", "off"),
        ("train.optimizer", train.optimizer != "adamw", library, "adamw"),
        ("train.packing", train.packing is False, "rows are packed when it is read block by block", "auto"),
        ("train.gradient_checkpointing", train.gradient_checkpointing is False, again, "auto"),
        ("train.generate_every", train.generate_every != "off", answers, "off"),
        ("evaluate.metrics", any(name != "perplexity" for name in metrics), answers, "[perplexity]"),
        ("evaluate.memorisation", probed, answers, "off"),
        ("gate", bool(gated), f"{', '.join(gated)} needs answers: {answers}", "perplexity or forgetting"),
    ]


def refuse_targets_outside_blocks(adapted: nn.Module) -> None:
    """Raises InputError when the method trains embeddings or head, of which only pieces are in memory."""
    outside = [name for name in trainable_parameters(adapted) if not name.startswith("model.layers.")]
    if outside:
        raise InputError(
            f"{outside[0].rpartition('.')[0]} is not in memory as a whole when the model is read block by block",
            where="method.targets",
            fix=f"use all-linear or modules inside the blocks; or raise {KEY}",
        )


def streamed_memory(adapted: StreamedModel, shape: Shape, load: StreamedLoad) -> Memory:
    """Bytes at the peak.

    In memory are one block, a slice of the head, the adapters with their gradients, the inputs of every block, and what
    the backward pass of one block keeps, with as much again for gradients; or, while they are saved, the optimizer's
    states.
    """
    width = BYTES[load.frozen_dtype]
    trained = sum(parameter.numel() for parameter in trainable_parameters(adapted).values())
    blocks = [sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in adapted.model.layers]
    weights = width * (max(blocks) + ROWS_AT_ONCE * shape.hidden) + 4 * trained
    arithmetic = BYTES[load.dtype]
    inputs = arithmetic * shape.layers * shape.hidden
    outputs = shape.linear_outputs / max(1, shape.layers)
    beside = 2 * shape.intermediate + 3 * shape.hidden + shape.key_value
    block = 2 * (arithmetic * (outputs + beside) + 4 * 4 * shape.hidden)
    head = load.targets * shape.hidden * (4 + 2 * arithmetic) + AT_ONCE * ROWS_AT_ONCE * (arithmetic + 2 * 4)
    activations = load.tokens * (inputs + block) + head
    # States lie in a file; while a checkpoint is written they are there twice, and gradients and activations are not.
    training = max(4 * trained + activations, 16 * trained)
    total = MARGIN * (weights + training + RUNTIME_BYTES)
    return Memory(
        weights=int(weights),
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=int(activations),
        runtime=RUNTIME_BYTES,
        peak_bytes=math.ceil(total),
    )


def tokens_at_once(needed: Callable[[int], int], budget: int, longest: int, step_tokens: int) -> int:
    """The number of tokens that runs through a block at a time, always the same one.

    As many as fit into the budget, and of those so few that the tokens of an average step fill the last pass too.

    Args:
        needed: bytes at the peak with so many tokens at a time.
        longest: tokens of the longest row, which is never parted.

    Raises:
        InputError: when not even the longest row fits, naming the smallest budget that would do.
    """
    least = _even(longest)
    if needed(least) > budget:
        smallest = math.ceil(needed(least) / 1e6)
        raise InputError(
            f"{budget / 1e6:,.0f} MB is too little: block by block and with the longest row alone ({longest} tokens) "
            f"the job needs about {smallest:,} MB",
            where=KEY,
            fix=f"use {KEY}: {smallest}MB or more, or lower method.rank or data.max_length",
        )
    most = least
    while most + STEP <= MOST_AT_ONCE and needed(most + STEP) <= budget:
        most += STEP
    passes = math.ceil(step_tokens * SPREAD / most)
    return max(least, min(most, _even(math.ceil(step_tokens * SPREAD / passes))))


def _even(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
