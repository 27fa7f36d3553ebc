"""One dry step at the worst-case length: what a job really needs, measured before it starts. Nothing is kept of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tunesmith.base import InputError, Progress, silent
from tunesmith.batch import Batch, pack
from tunesmith.objectives import Supervised, TaskObjective
from tunesmith.pipeline.finetune import load_base
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.usage import PeakMemory
from tunesmith.plan.hardware import DTYPES, wait_for
from tunesmith.train.batches import StepBatches
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer
from tunesmith.train.precision import Precision

MOST_STEPS = 2000
"""Steps among which the largest micro-batch is looked for."""


@dataclass(frozen=True)
class DryStep:
    """What was measured.

    Attributes:
        peak_bytes: the most that the process (on CUDA: the device's tensors) had while it loaded and trained.
        predicted_bytes: what the plan says of that phase.
        seconds: of the second step, whose kernels are there; ``first_seconds`` of the first.
        tokens, rows: of the micro-batch.
        stands_for: the objective whose loss was computed, where the job's own needs more than rows.
    """

    peak_bytes: int
    predicted_bytes: int
    seconds: float
    first_seconds: float
    tokens: int
    rows: int
    stands_for: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_step(planned: Planned, progress: Progress = silent) -> DryStep:
    """Loads and adapts the model and takes two steps with the largest micro-batch of the job.

    Raises:
        InputError: without rows, and for a job whose model is read block by block.
    """
    plan, recipe = planned.plan, planned.recipe
    if planned.prepared is None:
        raise InputError("a dry step needs rows and a tokenizer", where="--probe", fix="name data and a whole model")
    if plan.streamed_tokens is not None:
        raise InputError("a model that is read block by block keeps its budget, and needs no dry step", where="--probe")
    with PeakMemory(planned.hardware.device, every_seconds=0.002) as memory:
        progress("loading the model", 0, None)
        model, planned = load_base(planned)
        torch.manual_seed(recipe.seed)
        recipe.method.adapt(model)
        if plan.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        casts = recipe.method.needs_autocast or plan.dtype != plan.frozen_dtype
        precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)
        optimizer = build_optimizer(model, recipe.train, plan.learning_rate, recipe.method.rates(model))
        own = isinstance(planned.objective, Supervised | TaskObjective)
        objective = planned.objective if own else Supervised()
        batch = _largest(planned).to(planned.hardware.device)
        model.train()
        taken = list[float]()
        for number in range(2):
            progress("a dry step", number, 2)
            started = time.perf_counter()
            step(model, objective, optimizer, [batch], precision=precision)
            wait_for(planned.hardware.device)
            taken.append(time.perf_counter() - started)
    phases = {phase.name: phase.total for phase in plan.memory.phases}
    return DryStep(
        peak_bytes=memory.so_far(),
        predicted_bytes=max(phases.get("training", plan.memory.peak_bytes), phases.get("loading", 0)),
        seconds=taken[1],
        first_seconds=taken[0],
        tokens=batch.tokens,
        rows=batch.rows,
        stands_for=None if own else Supervised().kind,
    )


def _largest(planned: Planned) -> Batch:
    """The micro-batch with the most tokens."""
    prepared, plan = planned.prepared, planned.plan
    assert prepared is not None
    batches = StepBatches.of_job(planned.recipe, plan, prepared.train, prepared.order)
    groups = (group for step in range(1, min(plan.steps, MOST_STEPS) + 1) for group in batches.groups(step))
    chosen = max(groups, key=lambda group: int(prepared.train.lengths[group].sum()))
    packed = plan.packing and planned.recipe.method.can_pack
    return pack([prepared.train[at].example for at in chosen], "packed" if packed else "padded")
