"""How many rows fit into memory at a time, and whether the model does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from torch import nn

from tunesmith.base import InputError
from tunesmith.models.measure import Shape
from tunesmith.models.streamed import StreamedModel, streaming_obstacle
from tunesmith.objectives import Policy
from tunesmith.plan.decisions import Decisions
from tunesmith.plan.given import Given, Largest
from tunesmith.plan.hardware import Hardware
from tunesmith.plan.memory import Load, counted, predict_memory
from tunesmith.plan.streaming import (
    StreamedLoad,
    refuse_targets_outside_blocks,
    refuse_what_cannot_stream,
    streamed_memory,
    tokens_at_once,
)
from tunesmith.recipe import Recipe
from tunesmith.resolved import Memory, Resolved, Workload

TOKENS_AT_ONCE = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens in a micro-batch beyond which a device of this kind is no faster, only fuller."""
GENERAL_TOKENS = 4096
"""Tokens of general text that are read at a time; there are some four times as many."""
USABLE_MEMORY = 0.85
USUAL_SIZES = 16
"""Sizes of micro-batches where nobody has counted them."""
DTYPE = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Fit:
    """What decides how many rows fit.

    Attributes:
        max_new: tokens of the longest answer that is written while judging.
    """

    workload: Workload
    hardware: Hardware
    dtype: DTYPE
    frozen_dtype: DTYPE
    given: Given
    max_new: int = 0

    @property
    def average(self) -> int:
        """Tokens of a row."""
        return max(1, self.workload.tokens // max(1, self.workload.rows))

    def largest(self, rows: int) -> Largest:
        """The largest micro-batch of so many rows, as it is or as it is expected to be."""
        if self.given.heaviest is not None:
            return self.given.heaviest(rows)
        longest = self.workload.longest
        tokens = min(longest * rows, longest + self.average * (rows - 1) * 5 // 4)
        targets = math.ceil(tokens * self.workload.targets / max(1, self.workload.tokens))
        return Largest(tokens, targets, USUAL_SIZES)

    def load(self, recipe: Recipe, rows: int, checkpointing: bool) -> Load:
        largest = self.largest(rows)
        judged, most = self.given.judged, max(1, recipe.train.batch_size // self.hardware.processes)
        reads, writes, batch = 0, False, 0
        if recipe.evaluate != "off":
            reads = (
                GENERAL_TOKENS
                if recipe.evaluate.forgetting != "off"
                else math.ceil(judged.rows * (judged.row or self.average))
            )
            writes = judged.generates
            batch = min(recipe.evaluate.batch_size, judged.rows)
        drawing = recipe.objective if isinstance(recipe.objective, Policy) else None
        return Load(
            tokens=largest.tokens,
            targets=largest.targets,
            sizes=largest.sizes,
            passes=largest.passes,
            longest=self.workload.longest,
            checkpointing=checkpointing,
            device=self.hardware.device.type,
            accumulates=rows < most,
            judged=reads if judged.rows else 0,
            answers=batch if writes else 0,
            answer_tokens=(judged.longest or self.workload.longest) + self.max_new,
            drawn=0 if drawing is None else min(drawing.sample_batch, most * drawing.group_size),
            beside=self.given.beside,
            before=self.given.before,
            validates=recipe.train.evaluate_every != "off",
        )


def fit_or_stream(
    recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions
) -> tuple[int, bool, Memory, int | None]:
    """As `_fit`, and tokens at a time when the recipe's budget leaves room for one block of the model only."""
    budget = recipe.budget.memory_bytes
    if budget is None:
        return *_fit(recipe, adapted, shape, fit, decided), None
    if fit.hardware.device.type != "cpu" or fit.hardware.processes > 1:
        raise InputError(
            "a memory budget is kept by one process on a CPU; this job runs on "
            f"{fit.hardware.name} in {fit.hardware.processes} process{'es' * (fit.hardware.processes > 1)}",
            where="budget.memory",
            fix="leave it out; train.micro_batch and model.quantize lower a device's memory",
        )
    ordinary = Decisions()
    micro_batch, checkpointing, memory = _fit(recipe, adapted, shape, fit, ordinary)
    if memory.peak_bytes <= budget:
        decided.made += ordinary.made
        reason = f"the whole job is expected to need {memory.peak_bytes / 1e6:,.0f} MB"
        decided.made.append(Resolved(name="model in memory", value="whole", reason=reason))
        return micro_batch, checkpointing, memory, None
    return _streamed(recipe, adapted, shape, fit, decided)


def _streamed(
    recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions
) -> tuple[int, bool, Memory, int]:
    """As `_fit`, for a model of which one block is in memory, and the tokens that run through it at a time."""
    budget = cast(int, recipe.budget.memory_bytes)
    refuse_what_cannot_stream(recipe)
    if not isinstance(adapted, StreamedModel):
        obstacle = streaming_obstacle(cast(Any, adapted).config)
        raise InputError(
            f"{budget / 1e6:,.0f} MB is too little for the whole model, and {obstacle}",
            where="budget.memory",
            fix="raise it or leave it out",
        )
    refuse_targets_outside_blocks(adapted)

    share = fit.workload.targets / max(1, fit.workload.tokens)

    def memory(tokens: int) -> Memory:
        load = StreamedLoad(tokens, math.ceil(tokens * share), fit.dtype, fit.frozen_dtype)
        return streamed_memory(adapted, shape, load)

    batch, longest = recipe.train.batch_size, fit.workload.longest
    tokens = tokens_at_once(lambda tokens: memory(tokens).peak_bytes, budget, longest, batch * fit.average)
    why = f"as many rows as {tokens} tokens hold, within budget.memory"
    micro_batch = decided.settle("train.micro_batch", recipe.train.micro_batch, batch, why)
    reason = f"block by block: the whole job does not fit into {budget / 1e6:,.0f} MB"
    decided.made.append(Resolved(name="model in memory", value="one block", reason=reason))
    decided.settle(
        "train.gradient_checkpointing", recipe.train.gradient_checkpointing, True, "each block is read and run again"
    )
    decided.notes.append(
        "the model is read from its files twice for every micro-batch, and the backward pass computes every block "
        "again: training takes several times as long (docs/results/small-memory.md)"
    )
    return micro_batch, True, memory(tokens), tokens


def _fit(recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions) -> tuple[int, bool, Memory]:
    """Micro-batch and checkpointing: the fullest micro-batch that fits, recomputing only where none fits without.

    Where nothing fits, what needs least: not always the smallest micro-batch, for its more sizes have more kernels.
    """
    budget = min(USABLE_MEMORY * fit.hardware.memory_bytes, recipe.budget.memory_bytes or math.inf)
    model = counted(adapted, shape, recipe, fit.dtype, fit.frozen_dtype)

    @cache
    def memory(rows: int, checkpointing: bool) -> Memory:
        return predict_memory(model, recipe, fit.load(recipe, rows, checkpointing))

    asked_rows, asked_checkpointing = recipe.train.micro_batch, recipe.train.gradient_checkpointing
    sizes = _micro_batches(recipe, fit) if asked_rows == "auto" else [asked_rows]
    ways = [False, True] if asked_checkpointing == "auto" else [bool(asked_checkpointing)]
    choices = [(rows, checkpointing) for checkpointing in ways for rows in sizes]
    fitting = next((choice for choice in choices if memory(*choice).peak_bytes <= budget), None)
    rows, checkpointing = fitting or min(choices, key=lambda choice: memory(*choice).peak_bytes)
    without = "it fits without" if fitting else "it does not fit with it either"
    decided.settle(
        "train.gradient_checkpointing",
        asked_checkpointing,
        checkpointing,
        "it does not fit without" if checkpointing else without,
    )
    micro_batch = decided.settle(
        "train.micro_batch", asked_rows, rows, f"about {rows * fit.average} tokens at a time, within memory"
    )
    predicted = memory(micro_batch, checkpointing)
    if predicted.peak_bytes > budget:
        decided.notes.append(
            f"the job is expected to need {predicted.peak_bytes / 2**30:.1f} GiB; {fit.hardware.name} has "
            f"{fit.hardware.memory_bytes / 2**30:.1f} GiB"
        )
    return micro_batch, checkpointing, predicted


def _micro_batches(recipe: Recipe, fit: Fit) -> list[int]:
    """Rows at a time that are worth trying, the most first: powers of two, and the whole batch."""
    most = max(1, recipe.train.batch_size // fit.hardware.processes)
    worth = max(1, min(most, TOKENS_AT_ONCE.get(fit.hardware.device.type, 2048) // fit.average))
    powers = [1 << exponent for exponent in range(worth.bit_length())]
    return sorted({*powers, *([most] if worth == most else [])}, reverse=True)
