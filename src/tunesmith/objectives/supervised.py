"""Supervised fine-tuning: the negative log-likelihood of the answers (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TrainingObjective


class Supervised(TrainingObjective):
    """Cross-entropy of the target tokens, averaged over all targets of an optimizer step."""

    kind: Literal["sft"] = "sft"
    """Minimise the negative log-likelihood of the answers."""

    terms: ClassVar[tuple[str, ...]] = ("nll",)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": batch.tensors["target_weights"].double().sum()}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, chosen = token_logps(model, batch)
        return {"nll": -(logps * batch.tensors["target_weights"][chosen]).sum()}
