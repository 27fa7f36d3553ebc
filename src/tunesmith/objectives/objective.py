"""What every objective promises."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.base import Spec
from tunesmith.batch import Batch

Head = Literal["lm", "sequence", "token", "scalar"]


class TargetLogps(NamedTuple):
    """Log-likelihoods of what the rows ask for, in the order of the batch.

    Attributes:
        logps: fp32 ``[chosen]``, in nats.
        chosen: int64 ``[chosen]``: positions of those targets in the batch.
    """

    logps: Tensor
    chosen: Tensor


class TrainingObjective(Spec):
    """What is minimised: sums over tokens or rows, and the weights by which the loop divides them.

    The loop adds up `weights` over every micro-batch of the optimizer step and over all processes before the first
    backward pass, and divides each sum of `loss` by its own total. Splitting a batch therefore cannot change the
    gradient.
    """

    head: ClassVar[Head] = "lm"
    terms: ClassVar[tuple[str, ...]]
    """Names of the terms of the loss; `weights` and `loss` have exactly these."""
    loss_measures: ClassVar[bool] = True
    """Whether a loss that rises means that the model gets worse."""

    default_rate: ClassVar[float] = 1.0
    """Factor on the method's default learning rate."""

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        """Adds what must be known before the step, without gradient, to the batches of an optimizer step."""
        return window

    @abstractmethod
    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        """The log-likelihood of every target, for validation and judging."""

    def measured(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What validation adds up over batches, and what it divides it by, term by term.

        By default the negative log-likelihood of the targets, and their number.
        """
        logps, chosen = self.target_logps(model, batch)
        total = -(logps * batch.tensors["target_weights"][chosen]).double().sum()
        return {"nll": total}, {"nll": torch.tensor(len(chosen), dtype=torch.float64)}

    @abstractmethod
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """The divisor that this batch contributes to each term of the loss: fp64 scalars."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The sum of each term over this batch: fp32 scalars with gradient."""


class AroundObjective:
    """Something around an objective, which passes on what it does not change.

    Attributes:
        terms: as `TrainingObjective.terms`.
    """

    def __init__(self, objective: StepObjective) -> None:
        self.objective = objective
        self.terms: tuple[str, ...] = objective.terms

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        return self.objective.prepare(model, window)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return self.objective.weights(batch)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.objective.loss(model, batch)


StepObjective = TrainingObjective | AroundObjective
"""What a step minimises."""
