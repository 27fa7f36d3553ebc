"""Notices runs that are dead although they go on: divergence, collapse, an adapter that never moved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from tunesmith.base import TrainingError

RECENT = 5
SPIKE_WINDOW = 20
NOT_APPLIED_IN_A_ROW = 8
LEAST_NORM = 1e-7
"""A gradient below this has vanished whatever it was at the start: a run may be dead from its first step."""
LARGEST_WEIGHT = 1e8
"""No weight of a model that says anything is larger."""
FIX = "lower train.learning_rate, lengthen train.warmup, or look at the rows with `tunesmith data show`"


@dataclass
class Health:
    """Losses and gradients as far as they tell a living run from a dead one.

    Attributes:
        vocabulary: number of tokens of the model; a model that knows nothing has a loss of its logarithm.
        first_loss, first_norm: of the first step, before any update.
        opening: the first losses; their median is not misled by one easy or hard batch.
        recent: the last losses and gradient norms.
        losses: of the last steps that were applied.
        not_applied: steps in a row whose gradient could not be used.
        skipped: all such steps.
        loss_measures: whether a loss that rises means that the model gets worse.
    """

    vocabulary: int = 0
    first_loss: float | None = None
    first_norm: float | None = None
    opening: list[float] = field(default_factory=list)
    recent: list[tuple[float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    not_applied: int = 0
    skipped: int = 0
    loss_measures: bool = True

    def loss_limit(self, spike: float) -> float:
        """The loss above which a step is a spike: so many times the median of the last ones.

        Args:
            spike: the factor; infinite when spikes are not looked for.
        """
        return spike * median(self.losses) if len(self.losses) >= RECENT else math.inf

    def skip(self, step: int) -> None:
        """Takes in a step that was not applied.

        Raises:
            TrainingError: when there were too many in a row.
        """
        self.not_applied += 1
        self.skipped += 1
        if self.not_applied >= NOT_APPLIED_IN_A_ROW:
            raise TrainingError(
                f"step {step}: loss or gradient was not a finite number, or jumped, {self.not_applied} times in a row",
                fix=FIX,
            )

    def observe(self, step: int, loss: float, grad_norm: float) -> None:
        """Takes in a step that was applied.

        Raises:
            TrainingError: when the loss is far above its start, or stuck where the model knows nothing.
        """
        self.not_applied = 0
        self.losses = [*self.losses, loss][-SPIKE_WINDOW:]
        if self.first_loss is None or self.first_norm is None:
            self.first_loss, self.first_norm = loss, grad_norm
        self.opening = [*self.opening, loss][:RECENT]
        self.recent = [*self.recent, (loss, grad_norm)][-RECENT:]
        if len(self.recent) == RECENT:
            self._check(f"step {step}", margin=2.0)

    def conclude(self) -> None:
        """Looks back at the end of a run, with a stricter eye. Raises TrainingError as `observe` does."""
        if self.first_loss is None:
            raise TrainingError("no step had a finite loss", fix=FIX)
        if self.not_applied:
            raise TrainingError("the last step's loss or gradient was not a finite number, or jumped", fix=FIX)
        self._check("the end", margin=1.25)

    def _check(self, moment: str, margin: float) -> None:
        if not self.loss_measures:
            return
        first, norm = self.first_loss or 0.0, self.first_norm or 0.0
        # Medians, because one spike is no divergence.
        loss, gradient = (median(values) for values in zip(*self.recent, strict=True))
        ignorance = math.log(self.vocabulary) if self.vocabulary > 1 else math.inf
        # A small first batch may be an easy one: against it alone, only a model that knows little has diverged.
        knows_little = loss > ignorance / 2 or self.vocabulary < 2
        if loss > margin * median(self.opening) + 0.5 or (loss > margin * first + 0.5 and knows_little):
            raise TrainingError(
                f"diverged: the loss is {loss:.3g} at {moment}, and was {first:.3g} at the start", fix=FIX
            )
        vanished = gradient <= max(1e-3 * norm, LEAST_NORM)
        if abs(loss - ignorance) < 0.05 * ignorance and vanished and len(self.recent) == RECENT:
            raise TrainingError(
                f"collapsed: the loss stands at {loss:.3g}, which is the logarithm of the vocabulary, and the gradient "
                f"has vanished at {moment}",
                fix=FIX,
            )


def refuse_dead_weights(tensors: dict[str, Tensor], starting_at_zero: bool) -> None:
    """Raises TrainingError when trained weights are not finite, or an adapter never moved from zero."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"the trained weights are not finite (first: {name})", fix=FIX)
        largest = float(tensor.detach().abs().max())
        if largest > LARGEST_WEIGHT:
            raise TrainingError(
                f"the trained weights have grown beyond all measure (first: {name}, {largest:.2g})",
                fix=FIX,
            )
    moved = [name for name in tensors if name.endswith(("lora_B.weight", "lora_embedding_A"))]
    if starting_at_zero and moved and all(not bool(tensors[name].any()) for name in moved):
        raise TrainingError(
            "the adapter is still zero: training changed nothing", fix="raise train.learning_rate or train.steps"
        )
