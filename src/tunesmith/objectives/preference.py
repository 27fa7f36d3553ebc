"""Objectives over pairs of answers: DPO and its relatives, SimPO, CPO, ORPO.

Every row holds a prompt and two answers behind it, the better one first; each answer is a segment of its own, so that
the prompt is computed once. With a reference the batch carries the log-likelihoods that the model gave both answers
when this stage began, `reference_logps`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TargetLogps, TrainingObjective

REFERENCE = "reference_logps"
"""Name of the tensor with what the reference says of a row's two answers: fp32 ``[2]``, summed over tokens."""


class Answers(NamedTuple):
    """What a model says of the answers of a batch, those of a pair beside each other.

    Attributes:
        sums: fp32 ``[pairs, 2]``: log-likelihood in nats of the better and of the worse answer, over their tokens.
        lengths: ``[pairs, 2]``: weighted tokens of each.
    """

    sums: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Per token, ``[pairs, 2]``."""
        return self.sums / self.lengths


def answers_of_pairs(model: nn.Module, batch: Batch) -> Answers:
    """The log-likelihoods of both answers of every pair."""
    logps, chosen = token_logps(model, batch)
    which = which_answer(batch, chosen)
    weights = batch.tensors["target_weights"][chosen]
    count = 0 if not len(chosen) else int(which.max()) + 1
    sums = torch.zeros(count, device=logps.device).index_add(0, which, logps * weights)
    lengths = torch.zeros(count, device=logps.device).index_add(0, which, weights)
    return Answers(sums.view(-1, 2), lengths.view(-1, 2))


def which_answer(batch: Batch, places: Tensor) -> Tensor:
    """Number of the answer that each target belongs to, counted over the batch: int64 ``[targets]``."""
    starts = batch.segments[:, 0].contiguous().to(places.device)
    segment = torch.searchsorted(starts, places, right=True) - 1
    return torch.unique_consecutive(segment, return_inverse=True)[1]


class Pairwise(TrainingObjective):
    """What is common to objectives over pairs."""

    needs_reference: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("pairs",)
    pairs: ClassVar[bool] = True

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        """Minus the loss of each pair, at the first target of its better answer."""
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        which = which_answer(batch, chosen)
        first = torch.cat([chosen[:1], chosen[1:][which[1:] != which[:-1]]])[::2]
        return TargetLogps(-self.losses(answers_of_pairs(model, batch), batch.tensors.get(REFERENCE)), first)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": _pairs(batch)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = answers_of_pairs(model, batch)
        return {"pairs": self.losses(found, batch.tensors.get(REFERENCE)).sum()}

    @abstractmethod
    def losses(self, found: Answers, reference: Tensor | None) -> Tensor:
        """The loss of each pair, fp32 ``[pairs]``.

        Args:
            reference: fp32 ``[2 * pairs]``, as `Answers.sums` laid flat.
        """


def _pairs(batch: Batch) -> Tensor:
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    answers = 0 if not len(chosen) else int(which_answer(batch, chosen).max()) + 1
    return torch.tensor(answers / 2, dtype=torch.float64, device=chosen.device)


class Dpo(Pairwise):
    """Direct preference optimization (Rafailov et al. 2023, equation 7) and relatives with a reference."""

    kind: Literal["dpo"] = "dpo"
    """Make the better of two answers likelier than the worse, against what the model said before."""
    variant: Literal["sigmoid", "ipo", "hinge", "robust", "cpo"] = "sigmoid"
    """The function of the margin: -log sigmoid (DPO); a squared distance from 1 / (2 beta), over answers' means (IPO,
    Azar et al. 2024, equation 17); a hinge (SLiC, Zhao et al. 2023); DPO corrected for a known share of wrong labels
    (Chowdhury et al. 2024, equation 10), which is `label_smoothing`; or DPO without a reference (CPO, Xu et al. 2024,
    equation 3)."""
    beta: PositiveFloat = 0.1
    """How much moving away from the reference costs."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that may be labelled the wrong way round (conservative DPO, Mitchell 2023), for `sigmoid`,
    `robust` and `cpo`."""
    length_normalized: bool = False
    """Divide log-likelihoods by the answers' lengths (Meng et al. 2024, section 2), so that long answers weigh no more;
    `ipo` always does."""
    nll_weight: NonNegativeFloat | None = None
    """Adds the negative log-likelihood of the better answer a token, times this (RPO, Pang et al. 2024, equation 1),
    against a falling likelihood of both; 1 for `cpo` unless another is given, else 0."""

    @model_validator(mode="after")
    def _fits(self) -> Dpo:
        if self.label_smoothing and self.variant in ("ipo", "hinge"):
            raise ValueError(f"variant {self.variant} knows no label_smoothing")
        return self

    @property
    def uses_reference(self) -> bool:
        return self.variant != "cpo"

    @property
    def _nll_weight(self) -> float:
        if self.nll_weight is not None:
            return self.nll_weight
        return 1.0 if self.variant == "cpo" else 0.0

    def losses(self, found: Answers, reference: Tensor | None) -> Tensor:
        values = found.sums
        if self.uses_reference:
            assert reference is not None
            values = values - reference.view(-1, 2)
        if self.length_normalized or self.variant == "ipo":
            values = values / found.lengths
        margin = values[:, 0] - values[:, 1]
        losses = self._of_margin(margin)
        if self._nll_weight:
            losses = losses - self._nll_weight * found.means[:, 0]
        return losses

    def _of_margin(self, margin: Tensor) -> Tensor:
        scaled, wrong = self.beta * margin, self.label_smoothing
        if self.variant == "ipo":
            return (margin - 1 / (2 * self.beta)).square()
        if self.variant == "hinge":
            return torch.relu(1 - scaled)
        right_way, wrong_way = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
        if self.variant == "robust":
            return (right_way * (1 - wrong) - wrong_way * wrong) / (1 - 2 * wrong)
        return right_way * (1 - wrong) + wrong_way * wrong


class SimPo(Pairwise):
    """Simple preference optimization: likelihoods per token, a margin, and no reference (Meng et al. 2024)."""

    kind: Literal["simpo"] = "simpo"
    """Make the better answer likelier per token than the worse by a margin (Meng et al. 2024, equation 6)."""
    beta: PositiveFloat = 2.0
    """Scale of the difference of mean log-likelihoods; 2 to 2.5 in the paper."""
    gamma: NonNegativeFloat = 1.0
    """The margin that is aimed at, in units of the scaled difference; about half of beta in the paper."""

    uses_reference: ClassVar[bool] = False

    def losses(self, found: Answers, reference: Tensor | None) -> Tensor:
        means = found.means
        return -F.logsigmoid(self.beta * (means[:, 0] - means[:, 1]) - self.gamma)


class Orpo(Pairwise):
    """Odds-ratio preference optimization: fine-tuning and preference in one stage (Hong et al. 2024)."""

    kind: Literal["orpo"] = "orpo"
    """Learn the better answer, and make its odds larger than those of the worse (Hong et al. 2024, equation 6)."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the likelihood (lambda in the paper)."""

    uses_reference: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("nll", "pairs")

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        asked = batch.tensors["target_weights"]
        chosen = torch.nonzero(asked > 0).squeeze(1)
        better = which_answer(batch, chosen) % 2 == 0
        return {"nll": asked[chosen][better].double().sum(), "pairs": _pairs(batch)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = answers_of_pairs(model, batch)
        return {"nll": -found.sums[:, 0].sum(), "pairs": self.beta * self.odds(found).sum()}

    def losses(self, found: Answers, reference: Tensor | None) -> Tensor:
        return -found.means[:, 0] + self.beta * self.odds(found)

    def odds(self, found: Answers) -> Tensor:
        """-log sigmoid of the log odds ratio, ``[pairs]``; odds are p / (1 - p) of the mean token."""
        means = found.means.clamp_max(-1e-7)  # a likelihood of 1 has no odds
        log_odds = means - torch.log1p(-means.exp())
        return -F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
