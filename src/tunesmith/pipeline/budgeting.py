"""The best plan inside a budget of memory, time and money, and what was given up for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from tunesmith.base import InputError, Progress, silent
from tunesmith.models.streamed import streaming_obstacle
from tunesmith.pipeline.calibration import copy_of
from tunesmith.pipeline.estimating import estimate_job
from tunesmith.pipeline.planning import Planned
from tunesmith.plan.fit import USABLE_MEMORY
from tunesmith.plan.given import Given
from tunesmith.plan.machines import Machines, this_machine
from tunesmith.plan.resolve import resolve
from tunesmith.plan.streaming import may_stream
from tunesmith.plan.table import LOW_RANK, Table, Variant, fit_table, variants_of
from tunesmith.recipe import Recipe
from tunesmith.recipe_limits import BudgetSpec
from tunesmith.resolved import Plan

FEW_ROWS = 50
"""Held-out rows that are judged when time is short."""
LEAST_EPOCHS = 0.25


@dataclass(frozen=True)
class Choice:
    """What is proposed.

    Attributes:
        given_up: against the recipe with all weights trained in 16-bit arithmetic for all its epochs.
        settings: keys and values to write into the recipe, or behind it on the command line.
        machine: where.
    """

    plan: Plan | None
    given_up: list[str]
    settings: dict[str, Any]
    machine: str
    memory_bytes: int
    seconds: float
    price: float | None

    def as_json(self) -> dict[str, Any]:
        values = asdict(replace(self, plan=None))
        return {**values, "plan": None if self.plan is None else self.plan.model_dump(mode="json")}


def within_budget(recipe: Recipe, budget: BudgetSpec, machines: Machines, progress: Progress = silent) -> Choice:
    """The best plan inside a budget: with money on a machine that is rented, else on this one.

    Raises:
        InputError: when nothing fits, saying what the smallest plan would need.
    """
    asked = recipe.model_copy(update={"budget": BudgetSpec()})
    planned = estimate_job(asked, progress)
    assert planned.given is not None
    model = copy_of(planned, None)
    if budget.money is not None:
        here = this_machine(planned.hardware)
        table = fit_table(planned.recipe, model, planned.given, machines, here, planned.plan.steps)
        return rented(table, budget, planned.recipe)
    return _here(planned, model, planned.given, budget)


def table_of(recipe: Recipe, machines: Machines, progress: Progress = silent) -> Table:
    """What fits where, for a recipe."""
    planned = estimate_job(recipe, progress)
    assert planned.given is not None
    here = this_machine(planned.hardware)
    return fit_table(planned.recipe, copy_of(planned, None), planned.given, machines, here, planned.plan.steps)


def rented(table: Table, budget: BudgetSpec, recipe: Recipe) -> Choice:
    """The first variant, in the order of what is given up, that some machine can do; there the cheapest one.

    Where the recipe names its method, no variant that comes before it.
    """
    limits = budget.memory_bytes or math.inf, budget.seconds or math.inf, budget.money or math.inf
    machines = {one.name: one for one in table.machines.machines}
    priced = [cell for cell in table.cells if cell.fits and cell.price is not None and cell.machine in machines]
    best = _from_own_method(recipe, [one for one in table.variants if one.settings["train.dtype"] != "fp32"])
    for variant in best:  # fp32 throughout costs more and is no better
        inside = [
            cell
            for cell in priced
            if cell.variant == variant.name
            and machines[cell.machine].memory_bytes <= limits[0]
            and 3600 * (cell.hours or 0) <= limits[1]
            and (cell.price or 0) <= limits[2]
        ]
        if inside:
            cell = min(inside, key=lambda cell: cell.price or 0)
            given_up, settings = _given_up(recipe, variant), dict(variant.settings)
            if cell.checkpointing:
                given_up.append("activations are computed again in the backward pass: about a third more time")
                settings["train.gradient_checkpointing"] = True
            settings["train.micro_batch"] = min(cell.rows, variant.recipe.train.batch_size)
            if machines[cell.machine].count > 1:
                settings["train.shard"] = True
            hours, price = cell.hours or 0.0, cell.price
            return Choice(None, given_up, settings, cell.machine, cell.needed_bytes, 3600 * hours, price)
    cheapest = min(priced, key=lambda cell: cell.price or 0, default=None)
    fastest = min(priced, key=lambda cell: cell.hours or 0, default=None)
    if cheapest is None or fastest is None:
        raise InputError("no machine of the table that can be rented holds this model", where="budget.money")
    raise InputError(
        f"nothing fits: the cheapest way is {cheapest.variant} on {cheapest.machine} for {cheapest.price:,.2f} "
        f"{table.machines.currency} in {cheapest.hours:,.1f} h, the fastest {fastest.variant} on {fastest.machine} in "
        f"{fastest.hours:,.1f} h for {fastest.price:,.2f}",
        where="budget",
        fix="raise the budget, or lower train.epochs or data.max_length",
    )


def _here(planned: Planned, model: nn.Module, given: Given, budget: BudgetSpec) -> Choice:
    """The first of this machine's candidates that is inside the budget."""
    memory, seconds = budget.memory_bytes or math.inf, budget.seconds or math.inf
    tried = list[Choice]()
    for candidate, given_up, settings in _candidates(planned, memory):
        try:
            plan = _resolved(candidate, planned, model, given, memory)
        except InputError:
            continue
        choice = _choice(plan, given_up, settings, planned.hardware.name)
        tried.append(choice)
        if choice.memory_bytes > memory:
            continue
        if choice.seconds <= seconds:
            return choice
        shorter = _shorter(candidate, choice, seconds, planned.plan.epochs)
        if shorter is not None:
            return shorter
    if not tried:
        raise InputError("no method can train this model here", where="method.kind")
    least = min(tried, key=lambda choice: choice.memory_bytes)
    fastest = min(tried, key=lambda choice: choice.seconds)
    needs = [f"memory={math.ceil(least.memory_bytes / 1e7) / 100:g}GB"] * (budget.memory_bytes is not None)
    needs += [f"time={math.ceil(fastest.seconds / 60)}min"] * (budget.seconds is not None)
    raise InputError(
        f"nothing fits: the smallest plan ({_named(least)}) needs {least.memory_bytes / 1e9:,.2f} GB and the fastest "
        f"({_named(fastest)}) {fastest.seconds / 3600:,.2f} h",
        where="budget",
        fix=f"use {' and '.join(needs)} or more; a smaller model, fewer rows or data.max_length need less",
    )


def _named(choice: Choice) -> str:
    return ", ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in choice.settings.items())


def _from_own_method(recipe: Recipe, variants: list[Variant]) -> list[Variant]:
    """Those from the recipe's own method on, where it names one; a method that is not among them counts as LoRA."""
    if "method" not in recipe.model_fields_set:
        return variants
    kinds = [variant.settings["method.kind"] for variant in variants]
    first = next((kind for kind in (recipe.method.kind, "lora", "qlora") if kind in kinds), None)
    return [] if first is None else variants[kinds.index(first) :]


def _given_up(recipe: Recipe, variant: Variant) -> list[str]:
    """What a variant gives up, without what the recipe gave up itself."""
    own = "method" in recipe.model_fields_set and recipe.method.kind in ("lora", "qlora")
    return [text for text in variant.given_up if not (own and text == LOW_RANK)]


def _candidates(planned: Planned, memory: float) -> Iterator[tuple[Recipe, list[str], dict[str, Any]]]:
    """Recipes, what each gives up, and its settings: the recipe's own method first, where it names one."""
    recipe = planned.recipe
    if "method" in recipe.model_fields_set:
        yield recipe, [], {}
    for variant in _from_own_method(recipe, variants_of(recipe)[1:]):
        keep = {"dtype": recipe.train.dtype}  # `auto` knows what this machine computes
        train = variant.recipe.train.model_copy(update=keep)
        yield variant.recipe.model_copy(update={"train": train}), _given_up(recipe, variant), dict(variant.settings)
    if math.isfinite(memory) and may_stream(recipe) and streaming_obstacle(planned.config) is None:
        budget = BudgetSpec(memory=int(memory))
        text = "the frozen model is read from its files block by block: training takes several times as long"
        settings = {"method.kind": "lora", "budget.memory": f"{int(memory / 1e6)}MB"}
        given_up = [text] if "method" in recipe.model_fields_set else [LOW_RANK, text]
        yield recipe.model_copy(update={"budget": budget}), given_up, settings


def _resolved(recipe: Recipe, planned: Planned, model: nn.Module, given: Given, memory: float) -> Plan:
    hardware = planned.hardware
    if recipe.budget.memory is not None:
        from tunesmith.models.streamed import StreamedModel

        return resolve(recipe, StreamedModel(planned.config), hardware, given)
    if math.isfinite(memory):
        hardware = replace(hardware, memory_bytes=int(min(memory / USABLE_MEMORY, hardware.memory_bytes)))
    return resolve(recipe, model, hardware, given)


def _choice(plan: Plan, given_up: list[str], settings: dict[str, Any], machine: str) -> Choice:
    given_up, settings = list(given_up), dict(settings)
    if plan.streamed_tokens is None:
        if plan.gradient_checkpointing:
            given_up.append("activations are computed again in the backward pass: about a third more time")
        settings["train.gradient_checkpointing"] = plan.gradient_checkpointing
        settings["train.micro_batch"] = plan.micro_batch
        settings["train.dtype"] = plan.dtype
    return Choice(plan, given_up, settings, machine, plan.memory.peak_bytes, plan.time.seconds, None)


def _shorter(recipe: Recipe, choice: Choice, seconds: float, epochs: float) -> Choice | None:
    """The same with fewer rows judged and fewer epochs; None when less than a quarter of an epoch would remain."""
    plan = choice.plan
    assert plan is not None
    given_up, settings = list(choice.given_up), dict(choice.settings)
    judging = plan.time.evaluate_seconds
    if recipe.evaluate != "off" and recipe.evaluate.rows > FEW_ROWS and judging > seconds / 4:
        judging *= FEW_ROWS / recipe.evaluate.rows
        given_up.append(f"{FEW_ROWS} held-out rows are judged instead of {recipe.evaluate.rows}: wider intervals")
        settings["evaluate.rows"] = FEW_ROWS
    share = (seconds - judging) / max(1e-9, plan.time.train_seconds)
    if share < 1:
        fewer = math.floor(100 * share * epochs) / 100
        if fewer < min(LEAST_EPOCHS, epochs):
            return None
        given_up.append(f"{fewer:g} epochs instead of {epochs:g}")
        settings["train.epochs"] = fewer
    training = min(1.0, share) * plan.time.train_seconds
    return replace(choice, given_up=given_up, settings=settings, seconds=training + judging)


def refuse_beyond_budget(recipe: Recipe, plan: Plan) -> None:
    """Raises InputError when a job that is about to start is predicted to take longer, or to cost more, than it may."""
    budget, hours = recipe.budget, plan.time.seconds / 3600
    fix = "`tunesmith plan` on this recipe says what fits into the budget"
    if budget.seconds is not None and plan.time.seconds > budget.seconds:
        raise InputError(
            f"the job is predicted to take {hours:,.2f} h, more than {budget.time}", where="budget.time", fix=fix
        )
    if budget.money is None:
        return
    if budget.hourly_price is None:
        raise InputError(
            "nobody knows what this machine costs",
            where="budget.money",
            fix="say it in budget.hourly_price; `tunesmith plan` compares machines that can be rented",
        )
    if hours * budget.hourly_price > budget.money:
        raise InputError(
            f"the job is predicted to cost {hours * budget.hourly_price:,.2f}, more than {budget.money:g}",
            where="budget.money",
            fix=fix,
        )
