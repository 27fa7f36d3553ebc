"""What can go wrong in a step, and how it is recognised and told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.base import TrainingError
from tunesmith.batch import Batch
from tunesmith.objectives import AroundObjective, StepObjective
from tunesmith.resolved import Plan

MIB = 2**20

ROLLBACKS = 3
"""How often a run goes back because of a bad step before it ends."""

PREEMPTION_SECONDS = 30.0
"""What clusters and cloud machines commonly leave a job between SIGTERM and SIGKILL."""


class StepAbandoned(Exception):
    """Somebody asked the run to end inside a step."""


class Stoppable(AroundObjective):
    """An objective that looks, before each micro-batch, whether the run should end."""

    def __init__(self, objective: StepObjective, stop: Callable[[], bool]) -> None:
        super().__init__(objective)
        self._stop = stop

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self._stop():
            raise StepAbandoned
        return super().loss(model, batch)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a device, or on the host, for which torch has no class of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
    )


def memory_exhausted(plan: Plan, rows: int) -> TrainingError:
    """The error that ends a run whose memory does not suffice for a smaller micro-batch either.

    Args:
        rows: of the micro-batch that failed.
    """
    memory = plan.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "runtime": memory.runtime,
    }
    said = ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in parts.items())
    return TrainingError(
        f"out of memory with {rows} {'row' if rows == 1 else 'rows'} in a micro-batch; planned were "
        f"{memory.peak_bytes / MIB:,.0f} MiB: {said}",
        fix="lower train.micro_batch or data.max_length, set train.gradient_checkpointing: true, quantize the base "
        "(model.quantize), or use a machine with more memory",
    )


class Deadline:
    """Says once, as soon as it is known, that ending well takes longer than a preempted job is given."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit, self._told = emit, False
        self._micro_batch = self._save = 0.0

    def step_took(self, seconds: float, micro_batches: int) -> None:
        self._micro_batch = seconds / max(1, micro_batches)

    def saving(self, step: int, save: Callable[[], None]) -> None:
        """Saves, and takes the time."""
        started = time.perf_counter()
        save()
        self._save = time.perf_counter() - started
        needed = self._micro_batch + self._save
        if needed > PREEMPTION_SECONDS and not self._told:
            self._told = True
            message = (
                f"after SIGTERM this run needs about {needed:.0f} s to end well (a micro-batch "
                f"{self._micro_batch:.0f} s, a checkpoint {self._save:.0f} s): a job that is killed sooner goes on "
                "from its last checkpoint"
            )
            self._emit({"event": "warning", "step": step, "message": message})
