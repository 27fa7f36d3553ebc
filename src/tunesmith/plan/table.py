"""What fits where: methods and precisions on a table of machines, with rows, rate, hours and price."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from tunesmith.base import InputError
from tunesmith.methods import Full, Lora, Method, QLora
from tunesmith.models.measure import shape_of
from tunesmith.models.quantized import settled_quantization
from tunesmith.plan.activations import BYTES
from tunesmith.plan.duration import training_flops
from tunesmith.plan.fit import USABLE_MEMORY, Fit
from tunesmith.plan.given import Given
from tunesmith.plan.hardware import Hardware
from tunesmith.plan.machines import Machine, Machines
from tunesmith.plan.memory import Counted, counted, predict_memory
from tunesmith.recipe import Recipe
from tunesmith.resolved import Memory, Parameters

MOST_ROWS = 512


@dataclass(frozen=True)
class Variant:
    """A method in a precision, in the order of what is given up.

    Attributes:
        given_up: against the variant before everything is given up: all weights trained, in 16-bit arithmetic.
        settings: what to write into a recipe for it.
    """

    name: str
    recipe: Recipe
    dtype: str
    frozen_dtype: str
    given_up: tuple[str, ...]
    settings: dict[str, Any]


LOW_RANK = "only low-rank updates are trained, not all weights"
FOUR_BITS = "the frozen weights are rounded to 4 bits"


def variants_of(recipe: Recipe) -> list[Variant]:
    """The methods and precisions that are compared; the recipe's own LoRA, where it has one, is kept as it is."""
    own = recipe.method
    low = own if type(own) is Lora else Lora()
    four = own if isinstance(own, QLora) else QLora(**(low.model_dump(exclude={"kind"}) if type(own) is Lora else {}))

    def variant(name: str, method: Method, given_up: tuple[str, ...], **settings: Any) -> Variant:
        dtype = settings.get("train.dtype", "bf16")
        optimizer = settings.get("train.optimizer", "adamw")
        quantize = settings.get("model.quantize", "none")
        changed = recipe.model_copy(
            update={
                "method": method,
                "model": recipe.model.model_copy(update={"quantize": quantize, "dtype": "auto"}),
                "train": recipe.train.model_copy(update={"dtype": dtype, "optimizer": optimizer}),
            }
        )
        frozen = "fp32" if method.trains_all else dtype
        return Variant(
            name, changed, dtype, frozen, given_up, {"method.kind": method.kind, "train.dtype": dtype, **settings}
        )

    eight = {"train.optimizer": "adamw-8bit"}
    return [
        variant("full fp32", Full(), (), **{"train.dtype": "fp32"}),
        variant("full bf16", Full(), ()),
        variant("full bf16, 8-bit Adam", Full(), ("Adam's states are kept in 8 bits",), **eight),
        variant("lora bf16", low, (LOW_RANK,)),
        variant("lora int8", low, (LOW_RANK, "the frozen weights are rounded to 8 bits"), **{"model.quantize": "int8"}),
        variant("qlora nf4", four, (LOW_RANK, FOUR_BITS), **{"model.quantize": "nf4"}),
    ]


@dataclass(frozen=True)
class Cell:
    """One variant on one machine.

    Attributes:
        rows: the largest micro-batch of one device; 0 when not even one row fits.
        needed_bytes: of one device, with one row and with checkpointing.
        checkpointing: whether activations must be recomputed for ``rows``.
        tokens_per_second, hours, price: expected; None when it does not fit, or nobody rents it.
    """

    machine: str
    variant: str
    fits: bool
    rows: int
    checkpointing: bool
    needed_bytes: int
    tokens_per_second: float | None
    hours: float | None
    price: float | None


@dataclass(frozen=True)
class Table:
    """All of it.

    Attributes:
        tokens: that the job reads, every epoch counted.
        hosted: name and price of training on as many tokens through an API.
    """

    machines: Machines
    here: Machine
    variants: list[Variant]
    cells: list[Cell]
    tokens: int
    hosted: list[tuple[str, float]]

    def as_json(self) -> dict[str, Any]:
        return {
            "date": self.machines.date.isoformat(),
            "currency": self.machines.currency,
            "source": self.machines.source,
            "tokens": self.tokens,
            "machines": [one.model_dump() for one in (*self.machines.machines, self.here)],
            "cells": [asdict(cell) for cell in self.cells],
            "hosted": [{"name": name, "price": price} for name, price in self.hosted],
        }


def fit_table(recipe: Recipe, model: nn.Module, given: Given, machines: Machines, here: Machine, steps: int) -> Table:
    """Every variant on every machine.

    Args:
        model: the architecture on the meta device, not adapted.
        steps: optimizer steps of the job.
    """
    cells, variants = list[Cell](), list[Variant]()
    shape, given = shape_of(model), replace(given, heaviest=None)  # which knows no more rows than a step has
    for variant in variants_of(recipe):
        adapted = copy.deepcopy(model)
        try:
            held = settled_quantization(variant.recipe.model.quantization, cast(Any, model).config, recipe.model.path)
            cast(Any, adapted).is_quantized = held is not None
            variant.recipe.method.adapt(adapted)
        except InputError:  # weights that are stored quantized cannot all be trained, for example
            continue
        variants.append(variant)
        model_of_it = counted(adapted, shape, variant.recipe, variant.dtype, variant.frozen_dtype)
        candidate = _Candidate(variant, model_of_it, given, machines, steps)
        cells += [candidate.on(machine) for machine in (*machines.machines, here)]
    tokens = round(given.workload.tokens / max(1, given.workload.rows) * recipe.train.batch_size * steps)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    brackets = [one for one in machines.hosted if one.largest is None or size <= one.largest]
    smallest = min((one.largest for one in brackets if one.largest is not None), default=None)
    hosted = [(one.name, one.million * tokens / 1e6) for one in brackets if one.largest in (None, smallest)]
    return Table(machines, here, variants, cells, tokens, hosted)


@dataclass(frozen=True)
class _Candidate:
    variant: Variant
    model: Counted
    given: Given
    machines: Machines
    steps: int

    def on(self, machine: Machine) -> Cell:
        room = USABLE_MEMORY * machine.memory_bytes
        rows, checkpointing = 0, False
        for checkpointing in (False, True):
            while 2 * max(rows, 1) <= MOST_ROWS and self.needed(machine, 2 * rows or 1, checkpointing) <= room:
                rows = 2 * rows or 1
            if rows:
                break
        least, names = self.needed(machine, 1, True), (machine.name, self.variant.name)
        if not rows:
            return Cell(*names, False, 0, True, least, None, None, None)
        rate = self.rate(machine, rows, checkpointing)
        hours = self.tokens * self.variant.recipe.train.batch_size * self.steps / rate / 3600
        price = None if machine.price is None else hours * machine.price
        return Cell(*names, True, rows, checkpointing, least, rate, hours, price)

    @property
    def tokens(self) -> float:
        """Of a row."""
        return max(1.0, self.given.workload.tokens / max(1, self.given.workload.rows))

    def needed(self, machine: Machine, rows: int, checkpointing: bool) -> int:
        """Bytes of each device."""
        variant, device = self.variant, torch.device(machine.kind)
        hardware = Hardware(device, machine.name, machine.memory_bytes, machine.count, machine.kind != "cuda")
        dtype, frozen = cast(Any, (variant.dtype, variant.frozen_dtype))
        load = Fit(self.given.workload, hardware, dtype, frozen, self.given).load(variant.recipe, rows, checkpointing)
        return on_each(predict_memory(self.model, variant.recipe, load), machine.count)

    def rate(self, machine: Machine, rows: int, checkpointing: bool) -> float:
        """Tokens a second: products at a share of the peak, and what must pass through memory besides."""
        recipe, shape, trained = self.variant.recipe, self.model.shape, self.model.trained
        weights = shape.linear_weights
        parameters = Parameters(total=self.model.frozen + trained, trainable=trained)
        flops = training_flops(shape, parameters, self.given.workload)
        flops += 2 * weights * self.tokens * checkpointing
        seconds = flops / (machine.rate(self.variant.dtype) * self.machines.efficiency.of(machine))  # of a row
        traffic = 28.0 * trained / recipe.train.batch_size  # reading and writing weights, states and gradients
        if recipe.model.quantization is not None:  # made anew for every product of a micro-batch
            traffic += (3 if checkpointing else 2) * weights * (0.5 + 2 * BYTES[self.variant.dtype]) / rows
        return machine.count * self.tokens / (seconds + traffic / (machine.bandwidth * 1e9))


def on_each(memory: Memory, devices: int) -> int:
    """Bytes of each device when weights, gradients and states are spread over them (`train.shard`)."""
    spread = ("weights", "constants", "copies", "gradients", "optimizer")
    return math.ceil(
        max(
            sum(size / devices if name in spread else size for name, size in phase.parts.items())
            for phase in memory.phases
        )
    )
