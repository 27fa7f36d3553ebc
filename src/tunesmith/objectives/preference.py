"""Objectives over pairs of answers: DPO and its relatives, SimPO, ORPO.

Every row holds a prompt and two answers behind it, the better one first; each answer is a segment of its own, so that
the prompt is computed once, forward and backward. With a reference the batch carries the log-likelihood that the model
gave each target when this stage began, `reference_logps`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from tunesmith.batch import NO_PARENT, Batch
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TargetLogps, TrainingObjective

REFERENCE = "reference_logps"
"""Name of the tensor with what the reference says of each target: fp32 ``[targets]``, in nats."""


class Preference(TrainingObjective):
    """What is common to objectives that learn from better and worse answers."""

    @property
    def uses_reference(self) -> bool:
        """Whether batches must carry `reference_logps`."""
        return False

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        return token_logps(model, batch)

    def measured(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss itself: a preference has no likelihood of its own."""
        return self.loss(model, batch), self.weights(batch)


class Answers(NamedTuple):
    """What is said of the answers of a batch, those of a pair beside each other.

    Attributes:
        sums: fp32 ``[pairs, 2]``: log-likelihood in nats of the better and of the worse answer, over their tokens.
        lengths: ``[pairs, 2]``: tokens of each.
    """

    sums: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Per token, ``[pairs, 2]``."""
        return self.sums / self.lengths


def answers_of_pairs(logps: Tensor, batch: Batch) -> Answers:
    """Log-likelihoods of both answers of every pair.

    Args:
        logps: of every target of the batch, fp32 ``[targets]``.
    """
    which = which_answer(batch)
    pairs = _count(which)
    sums = torch.zeros(2 * pairs, device=logps.device).index_add(0, which, logps)
    lengths = torch.bincount(which, minlength=2 * pairs).to(logps.dtype)
    return Answers(sums.view(pairs, 2), lengths.view(pairs, 2))


def which_answer(batch: Batch) -> Tensor:
    """Number of the answer that each target belongs to, counted over the batch: int64 ``[targets]``."""
    places = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    starts = batch.segments[:, 0].contiguous().to(places.device)
    segment = torch.searchsorted(starts, places, right=True) - 1
    return torch.unique_consecutive(segment, return_inverse=True)[1]


class Pairwise(Preference):
    """What is common to objectives over pairs."""

    terms: ClassVar[tuple[str, ...]] = ("pairs",)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": number_of_pairs(batch)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = answers_of_pairs(token_logps(model, batch).logps, batch)
        return {"pairs": self.losses(found, self.reference(batch)).sum()}

    def reference(self, batch: Batch) -> Answers | None:
        return answers_of_pairs(batch.tensors[REFERENCE], batch) if self.uses_reference else None

    @abstractmethod
    def losses(self, found: Answers, reference: Answers | None) -> Tensor:
        """The loss of each pair, fp32 ``[pairs]``.

        Args:
            reference: the same answers as the reference finds them, for objectives that use it.
        """


def number_of_pairs(batch: Batch) -> Tensor:
    """fp64 scalar."""
    which = which_answer(batch)
    return torch.tensor(_count(which), dtype=torch.float64, device=which.device)


def _count(which: Tensor) -> int:
    return (int(which[-1]) + 1) // 2 if len(which) else 0


def tokens_of_better(batch: Batch) -> Tensor:
    """How many targets the better answers have: fp64 scalar."""
    return (which_answer(batch) % 2 == 0).double().sum()


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
    """Adds this times the negative log-likelihood of the better answers, averaged over their tokens, against a falling
    likelihood of both (RPO, Pang et al. 2024, equation 1; CPO, equation 3); 1 for `cpo` unless another is given, else
    0."""

    default_rate: ClassVar[float] = 0.25
    terms: ClassVar[tuple[str, ...]] = ("pairs", "nll")

    @model_validator(mode="after")
    def _fits(self) -> Dpo:
        if self.label_smoothing and self.variant in ("ipo", "hinge"):
            raise ValueError(f"variant {self.variant} knows no label_smoothing")
        if self.length_normalized and self.variant == "ipo":
            raise ValueError("variant ipo divides by lengths already: remove length_normalized")
        return self

    @property
    def uses_reference(self) -> bool:
        return self.variant != "cpo"

    @property
    def _nll_weight(self) -> float:
        if self.nll_weight is not None:
            return self.nll_weight
        return 1.0 if self.variant == "cpo" else 0.0

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": number_of_pairs(batch), "nll": tokens_of_better(batch)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = answers_of_pairs(token_logps(model, batch).logps, batch)
        nll = -found.sums[:, 0].sum() * self._nll_weight
        return {"pairs": self.losses(found, self.reference(batch)).sum(), "nll": nll}

    def losses(self, found: Answers, reference: Answers | None) -> Tensor:
        """The part that compares both answers."""
        values = found.sums if reference is None else found.sums - reference.sums
        if self.length_normalized or self.variant == "ipo":
            values = values / found.lengths
        return self._of_margin(values[:, 0] - values[:, 1])

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

    default_rate: ClassVar[float] = 0.25

    def losses(self, found: Answers, reference: Answers | None) -> Tensor:
        means = found.means
        return -F.logsigmoid(self.beta * (means[:, 0] - means[:, 1]) - self.gamma)


class Orpo(Pairwise):
    """Odds-ratio preference optimization: fine-tuning and preference in one stage (Hong et al. 2024)."""

    kind: Literal["orpo"] = "orpo"
    """Learn the better answer, and make its odds larger than those of the worse (Hong et al. 2024, equation 6)."""
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the likelihood (lambda in the paper)."""

    likelihood: Literal["answer", "conversation"] = "answer"
    """Which tokens of the better side are learned: those of the answer, or of the prompt too, as the authors' code and
    TRL do."""

    default_rate: ClassVar[float] = 0.25
    terms: ClassVar[tuple[str, ...]] = ("nll", "pairs")

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        learned = tokens_of_better(batch)
        if self.likelihood == "conversation":
            learned = learned + len(_prompt_places(batch))
        return {"nll": learned, "pairs": number_of_pairs(batch)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, prompts = self._logps(model, batch)
        found = answers_of_pairs(logps, batch)
        return {"nll": -found.sums[:, 0].sum() - prompts.sum(), "pairs": self.losses(found, None).sum()}

    def _logps(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of the answers' targets, and of the prompts' tokens where they are learned."""
        if self.likelihood == "answer":
            return token_logps(model, batch).logps, torch.zeros(())
        asked = batch.tensors["target_weights"]
        with_prompts = asked.index_fill(0, _prompt_places(batch), 1.0)
        both = replace(batch, tensors={**batch.tensors, "target_weights": with_prompts})
        logps, places = token_logps(model, both)
        answers = asked[places] > 0
        return logps[answers], logps[~answers]

    def losses(self, found: Answers, reference: Answers | None) -> Tensor:
        """The part that compares both answers."""
        return self.beta * self.odds(found)

    def odds(self, found: Answers) -> Tensor:
        """-log sigmoid of the log odds ratio, ``[pairs]``; odds are p / (1 - p) of the mean token."""
        means = found.means.clamp_max(-1e-7)  # a likelihood of 1 has no odds
        log_odds = means - torch.log1p(-means.exp())
        return -F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def _prompt_places(batch: Batch) -> Tensor:
    """Places of the tokens before each better answer, but for the first of a row, which follows nothing: ``[n]``."""
    asked = batch.tensors["target_weights"] > 0
    places = torch.nonzero(asked).squeeze(1)
    which, segments = which_answer(batch), batch.segments.tolist()
    found = [torch.zeros(0, dtype=torch.long)]
    for number in range(0, 2 * _count(which), 2):
        first = int(places[which == number][0])
        at = int(torch.searchsorted(batch.segments[:, 0].contiguous(), first, right=True)) - 1
        family = [torch.arange(segments[at][0], first)]
        while (at := segments[at][2]) != NO_PARENT:
            family.insert(0, torch.arange(segments[at][0], segments[at][0] + segments[at][1]))
        found.append(torch.cat(family)[1:])
    return torch.cat(found).to(asked.device)
