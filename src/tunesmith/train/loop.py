"""Training: `step` is one update of the weights, `train` is a run of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith.base import Interrupted
from tunesmith.batch import Batch
from tunesmith.methods import trainable_parameters
from tunesmith.objectives import TrainingObjective
from tunesmith.recipe import Plan, TrainSpec
from tunesmith.train.health import Health
from tunesmith.train.optim import learning_rate_at, set_learning_rate
from tunesmith.train.parallel import anywhere, from_main, sum_gradients, summed
from tunesmith.train.precision import Precision

RESUME = "continue with --resume"


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: sum of all terms, each averaged over its own weights in the whole step, over all processes.
        grad_norm: L2 norm of the gradient before clipping.
        tokens, targets: tokens run, and tokens trained on, over all processes.
        applied: false when the gradient was not finite, and the weights were left as they were.
    """

    loss: float
    grad_norm: float
    tokens: int
    targets: int
    applied: bool


def step(
    model: nn.Module,
    objective: TrainingObjective,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    clip: float | None = 1.0,
    precision: Precision | None = None,
) -> StepResult:
    """One optimizer step over ``batches``, the micro-batches of this process.

    Every weight of the step is counted, over all micro-batches and processes, before the first sum is divided: how
    rows are split into micro-batches or over processes cannot change the gradient.
    """
    precision = precision or Precision()
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
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf")))
    loss_value = float(summed(total_loss))
    applied = all(map(_is_finite, (grad_norm, loss_value)))
    precision.update(optimizer) if applied else precision.skip()
    return StepResult(loss_value, grad_norm, int(counts[0]), int(counts[1]), applied)


def _count(
    objective: TrainingObjective, window: Sequence[Batch], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The divisor of every term, and tokens and targets, over the whole step and all processes."""
    weights = [objective.weights(batch) for batch in window]
    names = objective.terms
    counts = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    for batch, weight in zip(window, weights, strict=True):
        counts[0] += batch.tokens
        counts[1] += int((batch.tensors["target_weights"] > 0).sum())
        counts[2:] += torch.stack([weight[name].to(device) for name in names])
    summed(counts)
    return {name: counts[2 + at].clamp_min(1e-12).float() for at, name in enumerate(names)}, counts[:2]


def _is_finite(value: float) -> bool:
    return value - value == 0.0


@dataclass
class Progress:
    """Where a run stands: everything besides tensors that a checkpoint must carry."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    health: Health = field(default_factory=Health)


@dataclass(frozen=True)
class Job:
    """What `train` needs to know and does not change.

    Attributes:
        batches: the micro-batches of this process for an optimizer step, counted from 1.
        save: writes a checkpoint of this moment; the flag says that it is the best one so far.
        stop: whether somebody asked the run to end.
    """

    model: nn.Module
    objective: TrainingObjective
    optimizer: Optimizer
    precision: Precision
    spec: TrainSpec
    plan: Plan
    batches: Callable[[int], Sequence[Batch]]
    save: Callable[[Progress, bool], None]
    stop: Callable[[], bool]


def train(
    job: Job,
    progress: Progress,
    *,
    evaluate: Callable[[int], float | None],
    emit: Callable[[dict[str, Any]], None],
) -> Progress:
    """Runs optimizer steps until the plan is done, validation says stop, or somebody does.

    Args:
        progress: a fresh one, or that of a checkpoint.
        evaluate: validation loss after a step; called as often as the plan says.
        emit: receives one event per step and evaluation.

    Raises:
        TrainingError: when the run diverged or collapsed; the last checkpoint is from before that was noticed.
        Interrupted: after a signal, when a checkpoint has been written.
    """
    plan, spec = job.plan, job.spec
    job.model.train()
    while progress.step < plan.steps and not progress.stopped_early:
        started = time.perf_counter()
        number = progress.step + 1
        rate = learning_rate_at(number, spec, plan)
        set_learning_rate(job.optimizer, rate)
        result = step(
            job.model,
            job.objective,
            job.optimizer,
            [batch.to(next(job.model.parameters()).device) for batch in job.batches(number)],
            clip=None if spec.clip == "off" else spec.clip,
            precision=job.precision,
        )
        progress.step = number
        progress.tokens += result.tokens
        progress.targets += result.targets
        emit(_step_event(number, result, rate, time.perf_counter() - started))
        progress.health.observe(number, result.loss, result.grad_norm)
        best = _evaluate_when_due(job, progress, evaluate)
        due = plan.checkpoint_every is not None and number % plan.checkpoint_every == 0
        finished = number == plan.steps or progress.stopped_early
        if finished:
            progress.health.conclude()
        stopping = anywhere(job.stop(), next(job.model.parameters()).device)
        if best or due or stopping or finished:
            job.save(progress, best)
        if stopping and not finished:
            raise Interrupted(f"stopped after step {number} of {plan.steps}; a checkpoint is written", fix=RESUME)
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


def _evaluate_when_due(job: Job, progress: Progress, evaluate: Callable[[int], float | None]) -> bool:
    """Measures the validation loss when it is time; returns whether it is the best so far."""
    number = progress.step
    intervals = [every for every in (job.plan.evaluate_every, job.spec.generate_every) if isinstance(every, int)]
    if not any(number % every == 0 for every in intervals) and (not intervals or number != job.plan.steps):
        return False
    loss = evaluate(number)
    job.model.train()
    loss = from_main(float("nan") if loss is None else loss, next(job.model.parameters()).device)
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
