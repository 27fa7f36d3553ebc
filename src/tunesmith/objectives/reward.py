"""Reward models: a number for every answer, larger for the better of two (Bradley & Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.forward import hidden_at
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives.objective import TargetLogps
from tunesmith.objectives.task import TaskObjective, places_of_targets


class Reward(TaskObjective):
    """A scalar head, read at the last token of each of two answers to one prompt, which is computed once."""

    kind: Literal["reward"] = "reward"
    """Give the better of two answers the larger number: -log sigmoid of the difference (Ouyang et al. 2022, equation
    1)."""
    margin: NonNegativeFloat = 0.0
    """By how much the better answer's number should be larger (Touvron et al. 2023, Llama 2, equation 2)."""
    centering: NonNegativeFloat = 0.0
    """Adds this times the squared sum of both numbers, so that rewards lie around zero, for example 0.01 (Eisenstein et
    al. 2023, section 4)."""

    terms: ClassVar[tuple[str, ...]] = ("pairs",)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("preference_accuracy", "margin", "calibration_error")

    def task_head(self) -> TaskHead:
        return TaskHead("sequence", ("reward",), "regression", "last", self.layer)

    def settled(self, answers: Iterable[Sequence[str]]) -> Reward:
        return self

    def encoded(self, answers: Sequence[str], targets: int) -> Tensor:
        """Pairs have no labels: their order says which answer is the better."""
        return torch.zeros(targets)

    def answer(self, outputs: Tensor) -> str:
        better, worse = (float(output) for output in outputs[:, 0])
        return f"{better:.2f} for the better answer, {worse:.2f} for the worse"

    def said(self, answers: Sequence[str]) -> str:
        return answers[0]

    def baseline(self, answers: Iterable[Sequence[str]]) -> Tensor:
        return torch.zeros(1)

    def margin_of(self, outputs: Tensor) -> float | None:
        return float(outputs[0, 0] - outputs[1, 0])

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        return hidden_at(model, batch, places_of_targets(batch), self.layer)

    def losses(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss of each pair, fp32 ``[pairs]``, from ``[2 * pairs, 1]`` outputs, the better answer's first."""
        better, worse = outputs.view(-1, 2).unbind(1)
        losses = -F.logsigmoid(better - worse - self.margin)
        return losses + self.centering * (better + worse).square() if self.centering else losses

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        """Minus half of a pair's loss for each of its answers."""
        losses = self.losses(self.outputs(model, batch), batch.tensors["labels"])
        return TargetLogps(-losses.repeat_interleave(2) / 2, places_of_targets(batch))

    def measured(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.loss(model, batch), self.weights(batch)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": (batch.tensors["target_weights"] > 0).double().sum() / 2}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": self.losses(self.outputs(model, batch), batch.tensors["labels"]).sum()}
