"""Training: `step` is one update of the weights, `train` is a run of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith.base import Interrupted, TrainingError
from tunesmith.batch import Batch
from tunesmith.methods import trainable_parameters
from tunesmith.objectives import StepObjective
from tunesmith.recipe import TrainSpec
from tunesmith.resolved import Plan
from tunesmith.train.average import Average
from tunesmith.train.health import FIX, Health
from tunesmith.train.optim import learning_rate_at, own_rates_at, set_learning_rate
from tunesmith.train.parallel import anywhere, clip_gradients, from_main, sum_gradients, summed, world_size
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import random_state, restore_random_state
from tunesmith.train.trouble import (
    ROLLBACKS,
    Deadline,
    StepAbandoned,
    Stoppable,
    is_out_of_memory,
    memory_exhausted,
)

RESUME = "continue with --resume"

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: sum of all terms, each averaged over its own weights in the whole step, over all processes.
        grad_norm: L2 norm of the gradient before clipping.
        tokens, targets: tokens run, and tokens trained on, over all processes.
        applied: false when loss or gradient was not finite or too large, and the weights were left as they were.
    """

    loss: float
    grad_norm: float
    tokens: int
    targets: int
    applied: bool


def step(
    model: nn.Module,
    objective: StepObjective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    clip: float | None = 1.0,
    precision: Precision | None = None,
    loss_limit: float = math.inf,
) -> StepResult:
    """One optimizer step over ``batches``, the micro-batches of this process.

    Every weight of the step is counted, over all micro-batches and processes, before the first sum is divided: how
    rows are split into micro-batches or over processes cannot change the gradient.

    Args:
        clip: largest L2 norm of the gradient.
        loss_limit: a step with a larger loss leaves the weights as they are.
    """
    precision = precision or Precision()
    with precision.arithmetic():
        window = objective.prepare(model, batches)
    totals, counts = _count(objective, window, next(model.parameters()).device)

    optimizer.zero_grad(set_to_none=True)
    total_loss = torch.zeros((), dtype=torch.float64, device=counts.device)
    for batch in window:
        with precision.arithmetic():
            sums = objective.loss(model, batch)
        loss = torch.stack([sums[name] / totals[name] for name in sums]).sum()
        precision.backward(loss)
        total_loss += loss.detach().double()

    parameters = list(trainable_parameters(model).values())
    sum_gradients(parameters)
    precision.unscale(optimizer)
    grad_norm = clip_gradients(parameters, math.inf if clip is None else clip)
    loss_value = float(summed(total_loss))
    applied = all(map(_is_finite, (grad_norm, loss_value))) and loss_value <= loss_limit
    precision.update(optimizer) if applied else precision.skip()
    return StepResult(loss_value, grad_norm, int(counts[0]), int(counts[1]), applied)


def _count(objective: StepObjective, window: Sequence[Batch], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The divisor of every term, and tokens and targets, over the whole step and all processes."""
    weights = [objective.weights(batch) for batch in window]
    names = objective.terms
    counts = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    for batch, weight in zip(window, weights, strict=True):
        counts[0] += 0 if batch.filler else batch.tokens
        counts[1] += int((batch.tensors["target_weights"] > 0).sum())
        counts[2:] += torch.stack([weight[name].to(device) for name in names])
    summed(counts)
    return {name: counts[2 + at].clamp_min(1e-12).float() for at, name in enumerate(names)}, counts[:2]


def _is_finite(value: float) -> bool:
    return value - value == 0.0


@dataclass
class Progress:
    """Where a run stands: everything besides tensors that a checkpoint must carry.

    Attributes:
        evaluation_due: the step is done, and what the plan measures after it is not.
        micro_batch: rows per forward pass after memory ran out; None while the plan's number holds.
        passed_over: steps whose rows are not trained on, after going back because of them.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    evaluation_due: bool = False
    micro_batch: int | None = None
    passed_over: list[int] = field(default_factory=list)
    health: Health = field(default_factory=Health)


class MicroBatches(Protocol):
    """The micro-batches of this process for an optimizer step, counted from 1, in the plan's size or another."""

    def __call__(self, step: int, micro_batch: int | None = None) -> Sequence[Batch]: ...


@dataclass(frozen=True)
class Job:
    """What `train` needs to know and does not change.

    Attributes:
        save: writes a checkpoint of this moment; the flag says that it is the best one so far.
        go_back: puts everything back to the last checkpoint and returns its progress; None where there is none.
        stop: whether somebody asked the run to end.
        average: of the trained weights, which is judged in their place.
    """

    model: nn.Module
    objective: StepObjective
    optimizer: Optimizer
    precision: Precision
    spec: TrainSpec
    plan: Plan
    batches: MicroBatches
    save: Callable[[Progress, bool], None]
    stop: Callable[[], bool]
    go_back: Callable[[], Progress | None] = lambda: None
    average: Average | None = None


def train(
    job: Job,
    progress: Progress,
    *,
    evaluate: Callable[[int], float | None],
    emit: Emit,
) -> Progress:
    """Runs optimizer steps until the plan is done, validation says stop, or somebody does.

    Args:
        progress: a fresh one, or that of a checkpoint.
        evaluate: validation loss after a step; called as often as the plan says. It may raise Interrupted.
        emit: receives one event per step and evaluation.

    Raises:
        TrainingError: when the run diverged, collapsed or ran out of memory; the last checkpoint is from before.
        Interrupted: after a signal, when a checkpoint has been written.
    """
    plan, deadline = job.plan, Deadline(emit)
    job.model.train()
    while progress.evaluation_due or (progress.step < plan.steps and not progress.stopped_early):
        if not progress.evaluation_due:
            now = _take_step(job, progress, emit, deadline)
            if now is not progress:  # back at an earlier checkpoint
                progress = now
                continue
        best = _evaluated(job, progress, evaluate)
        due = plan.checkpoint_every is not None and progress.step % plan.checkpoint_every == 0
        finished = progress.step == plan.steps or progress.stopped_early
        if finished:
            progress.health.conclude()
        stopping = anywhere(job.stop(), _device(job))
        if best or due or stopping or finished:
            deadline.saving(progress.step, partial(job.save, progress, best))
        if stopping and not finished:
            raise Interrupted(
                f"stopped after step {progress.step} of {plan.steps}; a checkpoint is written", fix=RESUME
            )
    return progress


def _take_step(job: Job, progress: Progress, emit: Emit, deadline: Deadline) -> Progress:
    """One more step; the progress of an earlier checkpoint when the recipe says to go back because of this one.

    A step that is stopped or runs out of memory inside its window leaves no trace: random states are put back.
    """
    number = progress.step + 1
    if number in progress.passed_over:
        progress.step = number
        emit({"event": "passed_over", "step": number})
        return progress
    started = time.perf_counter()
    rate = learning_rate_at(number, job.spec, job.plan)
    set_learning_rate(job.optimizer, rate, own_rates_at(number, job.spec, job.plan))
    before = random_state()
    # Another process would wait for this one's part of the gradient: several end together, after the step.
    stop = job.stop if world_size() == 1 else _never
    batches: Sequence[Batch] = ()
    try:
        batches = [batch.to(_device(job)) for batch in job.batches(number, progress.micro_batch)]
        result = step(
            job.model,
            Stoppable(job.objective, stop),
            job.optimizer,
            batches,
            clip=None if job.spec.clip == "off" else job.spec.clip,
            precision=job.precision,
            loss_limit=math.inf if job.spec.spike == "off" else progress.health.loss_limit(job.spec.spike),
        )
    except StepAbandoned:
        _undo(job, before)
        raise _stopped_inside(job, progress) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = None
    if result is None:  # not in the except block, where the error still holds what the failed attempt had computed
        _undo(job, before)
        rows = progress.micro_batch = _smaller_micro_batch(job, progress)
        message = f"out of memory: from step {number} on {rows} rows at a time; the gradient is the same"
        emit({"event": "warning", "step": number, "micro_batch": rows, "message": message})
        return _take_step(job, progress, emit, deadline)
    seconds = time.perf_counter() - started
    deadline.step_took(seconds, len(batches))
    progress.step = number
    progress.tokens += result.tokens
    progress.targets += result.targets
    emit(_step_event(number, result, rate, seconds))
    if not result.applied:
        return _after_bad_step(job, progress, result, emit)
    if job.average is not None:
        job.average.update()
    progress.health.observe(number, result.loss, result.grad_norm)
    return progress


def _step_event(number: int, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "loss": result.loss if _is_finite(result.loss) else None,
        "tokens": result.tokens,
        "targets": result.targets,
        "seconds": seconds,
        "grad_norm": result.grad_norm if _is_finite(result.grad_norm) else None,
        "learning_rate": rate,
        "applied": result.applied,
    }


def _after_bad_step(job: Job, progress: Progress, result: StepResult, emit: Emit) -> Progress:
    """Goes on, goes back or ends, as the recipe says."""
    number, finite = progress.step, _is_finite(result.loss) and _is_finite(result.grad_norm)
    overflow = job.precision.scaler.is_enabled() and not finite
    if job.spec.bad_step == "skip" or overflow:
        progress.health.skip(number)
        return progress
    what = f"step {number}: the loss jumped to {result.loss:.3g}"
    if not finite:
        what = f"step {number}: loss or gradient was not a finite number"
    if job.spec.bad_step == "stop":
        raise TrainingError(what, fix=f"{FIX}; train.bad_step: skip or rollback goes on")
    if len(progress.passed_over) >= ROLLBACKS:
        raise TrainingError(f"{what}, after going back {ROLLBACKS} times", fix=FIX)
    earlier = job.go_back()
    if earlier is None:
        raise TrainingError(
            f"{what}, and there is no checkpoint to go back to", fix=f"lower train.checkpoint_every, or {FIX}"
        )
    earlier.passed_over = [*progress.passed_over, number]
    message = f"{what}: back to step {earlier.step}, its rows are passed over"
    emit({"event": "warning", "step": number, "rollback_to": earlier.step, "message": message})
    return earlier


def _undo(job: Job, random_states: dict[str, Tensor]) -> None:
    job.optimizer.zero_grad(set_to_none=True)
    restore_random_state(random_states)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stopped_inside(job: Job, progress: Progress) -> Interrupted:
    if progress.step == 0:
        return Interrupted("stopped before the first step was done", fix=RESUME)
    job.save(progress, False)
    return Interrupted(f"stopped after step {progress.step} of {job.plan.steps}; a checkpoint is written", fix=RESUME)


def _smaller_micro_batch(job: Job, progress: Progress) -> int:
    rows = progress.micro_batch or job.plan.micro_batch
    if progress.micro_batch is not None or rows == 1 or world_size() > 1:
        raise memory_exhausted(job.plan, rows)
    return rows // 2


def _never() -> bool:
    return False


def _evaluated(job: Job, progress: Progress, evaluate: Callable[[int], float | None]) -> bool:
    """Measures what is due after a step; a stop on the way keeps the step, and what is due is done on resuming."""
    progress.evaluation_due = True
    try:
        best = _evaluate_when_due(job, progress, evaluate)
    except Interrupted as error:
        job.save(progress, False)
        raise Interrupted(f"{error.what}; a checkpoint of step {progress.step} is written", fix=RESUME) from error
    progress.evaluation_due = False
    return best


def _evaluate_when_due(job: Job, progress: Progress, evaluate: Callable[[int], float | None]) -> bool:
    """Measures the validation loss when it is time; returns whether it is the best so far."""
    number = progress.step
    intervals = [every for every in (job.plan.evaluate_every, job.spec.generate_every) if isinstance(every, int)]
    if not any(number % every == 0 for every in intervals) and (not intervals or number != job.plan.steps):
        return False
    with nullcontext() if job.average is None else job.average.in_place():
        loss = evaluate(number)
    job.model.train()
    loss = from_main(float("nan") if loss is None else loss, _device(job))
    if not _is_finite(loss):
        return False
    patience = job.spec.early_stopping
    least_gain = 0.0 if patience == "off" else patience.min_delta
    if progress.best_loss is None or loss < progress.best_loss - least_gain:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, number, 0
        return True
    progress.evaluations_without_gain += 1
    progress.stopped_early = patience != "off" and progress.evaluations_without_gain >= patience.patience
    return False


def _device(job: Job) -> torch.device:
    return next(job.model.parameters()).device
