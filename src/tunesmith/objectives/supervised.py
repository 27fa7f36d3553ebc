"""Supervised fine-tuning: the negative log-likelihood of the answers (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TargetLogps, TrainingObjective


class Supervised(TrainingObjective):
    """Cross-entropy of the target tokens, averaged over all targets of an optimizer step."""

    kind: Literal["sft"] = "sft"
    """Minimise the negative log-likelihood of the answers."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This share of each target is spread evenly over the vocabulary (Szegedy et al. 2016, section 7). Validation loss
    and perplexity are measured without it."""

    terms: ClassVar[tuple[str, ...]] = ("nll",)

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        return token_logps(model, batch)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": batch.tensors["target_weights"].double().sum()}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, chosen = token_logps(model, batch, self.label_smoothing)
        return {"nll": -(logps * batch.tensors["target_weights"][chosen]).sum()}
