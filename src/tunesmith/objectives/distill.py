"""Knowledge distillation: a student learns what a teacher finds likely (Hinton et al. 2015), not only what was said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.forward import likeliest_next
from tunesmith.objectives.logps import TargetOutcomes, token_logps, token_outcomes
from tunesmith.objectives.objective import TargetLogps, TrainingObjective

TEACHER_TOKENS, TEACHER_LOGPS = "teacher_tokens", "teacher_logps"
"""Names of the tensors with what the teacher finds likeliest at each target: int32 ``[targets, k]``, and fp32
``[targets, k + 1]`` in nats at the objective's temperature, with all other tokens together in the last column."""
WRITTEN = "written_weights"
"""Name of the tensor, one entry a token, that takes the place of ``target_weights`` in the cross-entropy: zero where an
answer is the student's own, which nobody wrote down as right."""
NEEDS_DIVERGENCE = ("divergence", "beta", "temperature", "top_k")
NEEDS_ANSWERS = ("sample_temperature", "max_new_tokens")


class Distill(TrainingObjective):
    """Divergence from a teacher's distribution at every target, mixed with the targets' cross-entropy."""

    kind: Literal["distill"] = "distill"
    """Learn what a teacher says: weight * T^2 * divergence + (1 - weight) * cross-entropy (Hinton et al. 2015, section
    2, where T^2 keeps the gradients' size under a temperature T)."""
    teacher: str | None = Field(default=None, min_length=1)
    """The model to learn from: a directory, a hub id, an adapter or a run. Its tokenizer must be the student's. It
    runs once, before the student is loaded; what it says is kept on disk."""
    teacher_prompt: str | None = Field(default=None, min_length=1)
    """A system text that the teacher alone reads before every conversation, so that the student learns to answer as if
    it had read it too (Askell et al. 2021, section 2.2: context distillation). Without `teacher` the base teaches
    itself."""
    answers: Literal["data", "teacher"] = "data"
    """Whose answers are trained on: those of the rows, or the teacher's own to their prompts (sequence-level
    distillation, Kim & Rush 2016, section 3.2), which it gives once and which are kept on disk. With `weight: 0` the
    student learns these answers alone."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps in which the student answers the prompts itself and the teacher says what would have been
    likelier (generalized knowledge distillation, Agarwal et al. 2023, algorithm 1; lambda in the paper). The teacher
    stays in memory beside the student. In these steps there is no cross-entropy."""
    sample_temperature: NonNegativeFloat | Literal["auto"] = "auto"
    """How answers are sampled, 0 for the likeliest token; `auto` is 0 for the teacher's and 1 for the student's own."""
    max_new_tokens: PositiveInt | Literal["auto"] = "auto"
    """Longest such answer; `auto` is one and a half times the longest answer of the training rows, at least 16."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    """KL(teacher || student), which covers all that the teacher does; KL(student || teacher), which keeps to what it
    mostly does (Gu et al. 2023); or the generalized Jensen-Shannon divergence between them (Agarwal et al. 2023,
    equation 1)."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Of `jsd`: the teacher's share in the mixture; near 0 it is like the forward KL, near 1 like the reverse. 0.5
    unless it is given."""
    temperature: PositiveFloat = 1.0
    """Both models' logits are divided by it before they are compared; above 1 unlikely tokens count for more."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Share of the divergence in the loss; the rest is the cross-entropy of the answers."""
    top_k: PositiveInt = 64
    """Tokens whose probability by the teacher is kept at each target; all others count as one further outcome with the
    sum of theirs, so that the divergence is a true one, of a coarser choice, and never more than that of the whole
    vocabulary."""

    terms: ClassVar[tuple[str, ...]] = ("divergence", "nll")

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if self.teacher is None and self.teacher_prompt is None:
            raise ValueError("there is no teacher: name one in `teacher`, or give the base a `teacher_prompt`")
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(f"beta belongs to divergence jsd, and this is {self.divergence}")
        if self.weight == 0:
            self._refuse_idle_teacher()
        if not self.writes and (idle := self._changed(NEEDS_ANSWERS)):
            raise ValueError(f"{idle[0]} is about answers that a model gives: set answers: teacher, or on_policy")
        return self

    def _refuse_idle_teacher(self) -> None:
        if self.on_policy:
            raise ValueError("with weight 0 the student's own answers teach it nothing; raise weight, or on_policy: 0")
        if self.answers == "data":
            raise ValueError("with weight 0 the teacher has no say: use kind: sft, or answers: teacher")
        if idle := self._changed(NEEDS_DIVERGENCE):
            raise ValueError(f"with weight 0 there is no divergence, and {idle[0]} changes nothing")

    def _changed(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def writes(self) -> bool:
        """Whether a model gives answers to be trained on."""
        return self.answers == "teacher" or self.on_policy > 0

    @property
    def own_base(self) -> bool:
        """Whether the base teaches itself."""
        return self.teacher is None

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        """Minus the loss of each target."""
        found, divergence = self._compared(model, batch)
        losses = self._scale * divergence - (1 - self.weight) * found.logps
        return TargetLogps(-losses, found.chosen)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        asked = batch.tensors["target_weights"]
        return {"divergence": asked.double().sum(), "nll": batch.tensors.get(WRITTEN, asked).double().sum()}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found, divergence = self._compared(model, batch)
        asked = batch.tensors["target_weights"][found.chosen]
        written = batch.tensors.get(WRITTEN, batch.tensors["target_weights"])[found.chosen]
        return {
            "divergence": self._scale * (divergence * asked).sum(),
            "nll": -(1 - self.weight) * (found.logps * written).sum(),
        }

    def says(self, teacher: nn.Module, batch: Batch, student_rows: int) -> dict[str, Tensor]:
        """What a teacher says of the targets of a batch: the tensors that `loss` reads; no gradient.

        Args:
            student_rows: rows of the student's vocabulary.
        """
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        tokens, logps = likeliest_next(teacher, batch, batch.before(chosen), self.top_k, self.temperature, student_rows)
        return {TEACHER_TOKENS: tokens.int(), TEACHER_LOGPS: logps}

    @property
    def _scale(self) -> float:
        return self.weight * self.temperature**2

    def _compared(self, model: nn.Module, batch: Batch) -> tuple[TargetOutcomes, Tensor]:
        """What the student says, and its divergence from the teacher at each target, fp32 ``[targets]``."""
        if self.weight == 0:
            logps, chosen = token_logps(model, batch)
            return TargetOutcomes(logps[:, None], logps, chosen), torch.zeros_like(logps)
        found = token_outcomes(model, batch, batch.tensors[TEACHER_TOKENS].long(), self.temperature)
        return found, self.compare(batch.tensors[TEACHER_LOGPS], found.outcomes)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The divergence in nats, ``[n]``, of log-probabilities ``[n, outcomes]``."""
        if self.divergence == "jsd":
            return jensen_shannon(teacher, student, 0.5 if self.beta is None else self.beta)
        return kl(teacher, student) if self.divergence == "forward-kl" else kl(student, teacher)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) = sum p (log p - log q), in nats, ``[n]``, of log-probabilities ``[n, outcomes]``."""
    return (first.exp() * (first - second)).sum(-1)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (Agarwal et al. 2023, equation 1)."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
