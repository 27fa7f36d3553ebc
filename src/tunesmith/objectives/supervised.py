"""Supervised fine-tuning: the negative log-likelihood of the answers (Ouyang et al. 2022, section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.noise import NOISE, noise_of_rows
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TargetLogps, TrainingObjective


class NextToken(TrainingObjective):
    """Cross-entropy of the target tokens."""

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


class Supervised(NextToken):
    """Cross-entropy of the answers' tokens, averaged over an optimizer step."""

    kind: Literal["sft"] = "sft"
    """Minimise the negative log-likelihood of the answers."""

    average: Literal["tokens", "rows"] = "tokens"
    """What a step's loss is the mean of: of all target tokens of the step, so that a long answer counts for more than a
    short one; or of rows, each with the mean of its own tokens, so that every row counts the same. Neither depends on
    how the step is split. `tokens` is what TRL and Axolotl do within a step. Validation loss and perplexity are always
    per token."""
    noise: NonNegativeFloat = 0.0
    """NEFTune (Jain et al. 2024, algorithm 1): uniform noise on the embeddings of every training row, up to this
    divided by the root of the row's tokens times the width; 5 in the paper, 0 for none. It is drawn anew for each row
    and step from the run's seed, and never while a model is judged."""

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        if not self.noise or not model.training:
            return window
        # One number a step: what noise a row gets depends on it and on the row's tokens, not on how rows are split.
        seed = int(torch.randint(2**62, ()))
        return [
            replace(
                batch,
                tensors={**batch.tensors, NOISE: noise_of_rows(batch, seed, self.noise)},
                scopes={**batch.scopes, NOISE: "segment"},
            )
            for batch in window
        ]

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        if self.average == "tokens":
            return super().weights(batch)
        return {"nll": (_sums_of_rows(batch) > 0).double().sum()}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self.average == "tokens":
            return super().loss(model, batch)
        logps, chosen = token_logps(model, batch, self.label_smoothing)
        shares = batch.tensors["target_weights"][chosen] / _sums_of_rows(batch)[_rows(batch, chosen)]
        return {"nll": -(logps * shares).sum()}


def _rows(batch: Batch, places: Tensor) -> Tensor:
    """The row of each place; a row of this objective is one segment."""
    starts = batch.segments[:, 0].contiguous().to(places.device)
    return torch.searchsorted(starts, places, right=True) - 1


def _sums_of_rows(batch: Batch) -> Tensor:
    """Target weights of each row, fp32 ``[rows]``."""
    weights = batch.tensors["target_weights"]
    places = torch.arange(len(weights), device=weights.device)
    return weights.new_zeros(len(batch.segments)).index_add(0, _rows(batch, places), weights)
