"""Objectives over answers that the model itself has given: GRPO and RLOO, and what they share with PPO.

Every row holds a prompt and the answers drawn to it, each a segment behind the prompt; what an answer ends with (the
stop token that was drawn, or nothing where the limit cut it) is a target like its other tokens. A batch carries, one
entry a target, `old_logps`: what the policy gave each token when it was drawn; `reference_logps`: what the model gave
it as this stage began; and `advantages`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from tunesmith.base import Spec
from tunesmith.batch import Batch
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.objective import TargetLogps, TrainingObjective
from tunesmith.objectives.preference import REFERENCE, which_answer
from tunesmith.objectives.rewards import Rewards

OLD, ADVANTAGES = "old_logps", "advantages"
"""Names of the tensors of a batch, fp32 ``[targets]`` each."""
LEAST_DEVIATION = 1e-4
"""Added to standard deviations that are divided by, as TRL does."""


@dataclass(frozen=True)
class Rollout:
    """Answers that a policy gave, group after group, with what is known of them.

    Attributes:
        rewards: fp64 ``[answers]``; those of one prompt stand beside each other.
        group: answers a prompt.
        lengths: int64 ``[answers]``, tokens of each.
        logps: fp32 ``[tokens]``: log-probability of every token under the policy that drew it.
        reference: fp32 ``[tokens]``, under the reference; None where nothing is compared with one.
        values: fp32 ``[tokens]``: what the value head expected before every token; None without one.
        kl: what a nat of distance from the reference costs.
    """

    rewards: Tensor
    group: int
    lengths: Tensor
    logps: Tensor
    reference: Tensor | None
    values: Tensor | None
    kl: float

    def answer_of_token(self) -> Tensor:
        """int64 ``[tokens]``: number of the answer that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def distances(self) -> Tensor:
        """log policy - log reference of every token, fp32 ``[tokens]``; zeros without a reference."""
        return torch.zeros_like(self.logps) if self.reference is None else self.logps - self.reference

    def summed(self, tokens: Tensor) -> Tensor:
        """``[tokens]`` added up over each answer: fp64 ``[answers]``."""
        sums = torch.zeros(len(self.lengths), dtype=torch.float64)
        return sums.index_add(0, self.answer_of_token(), tokens.double())


class RolloutServer(Spec):
    """A vLLM server that draws the answers, with each new adapter put into it while it runs."""

    server: str
    """Its address, such as `http://localhost:8000`. It serves the weights that this job starts from, started as
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank RANK`; a key that it asks for
    is read from the environment variable `VLLM_API_KEY`."""
    adapters: str | None = Field(default=None, min_length=1)
    """A directory that this process and the server see under the same path, in which each adapter is put for as long as
    its answers are drawn. Without it `rollout-adapters/` in the run."""
    timeout: PositiveFloat = 600.0
    """Longest wait for one answer of the server, in seconds."""

    @field_validator("server")
    @classmethod
    def _is_address(cls, server: str) -> str:
        if not re.fullmatch(r"https?://[^/\s]+/?", server):
            raise ValueError(f"{server!r} is no address of a server: write http://HOST:PORT, without a path")
        return server


class Policy(TrainingObjective):
    """What is common to objectives that draw answers, score them, and make the better ones likelier."""

    reward: Rewards
    group_size: int = Field(default=8, ge=2)
    """Answers drawn to each prompt. A step has `train.batch_size` prompts, and this many answers to each."""
    max_new_tokens: PositiveInt = 256
    """Longest answer that is drawn, in tokens, its ending included. Answers are drawn from the policy as it is, at
    temperature 1 and from the whole vocabulary: of any other way of drawing them the gradient would be a wrong one."""
    sample_batch: PositiveInt = 32
    """Answers that are drawn at a time; fewer need less memory. It changes no answer beyond rounding."""
    rollouts: RolloutServer | None = None
    """Who draws the answers of training: a vLLM server, for plain LoRA; without it this process. What a token's
    likelihood was when it was drawn is computed by this process in any case, and how far the server is from that stands
    in `events.jsonl`. Validation and evaluation answer in this process."""
    passes: PositiveInt = 1
    """Optimizer steps that are taken with the same answers before new ones are drawn."""
    clip: PositiveFloat = 0.2
    """How far the likelihood of what is said may move from where it was drawn before a step stops gaining by it: a
    ratio of 1 plus or minus this (Schulman et al. 2017, equation 7)."""
    cut_penalty: NonNegativeFloat = 0.0
    """Taken off the reward of an answer that `max_new_tokens` cut before it ended."""

    terms: ClassVar[tuple[str, ...]] = ("policy",)
    loss_measures: ClassVar[bool] = False
    has_values: ClassVar[bool] = False
    """Whether a value head is trained beside the model's own."""

    @property
    @abstractmethod
    def kl_weight(self) -> float:
        """What a nat of distance from the reference costs at the start; 0 where there is no reference."""

    def next_kl_weight(self, weight: float, distance: float) -> float:
        """That weight after answers whose mean distance from the reference was ``distance`` nats."""
        return weight

    @abstractmethod
    def signals(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the batches carry besides log-probabilities: named tensors fp32 ``[tokens]``."""

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        return token_logps(model, batch)


def answers_of(batch: Batch) -> tuple[Tensor, int]:
    """The answer that each target belongs to, int64 ``[targets]``, counted over the batch; and how many there are."""
    which = which_answer(batch)
    return which, 0 if not len(which) else int(which[-1]) + 1


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Minus the clipped surrogate (Schulman et al. 2017, equation 7): -min(r A, clip(r, 1 - low, 1 + high) A)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def distance_estimate(logps: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) of each token that is never negative and has little variance.

    exp(d) - d - 1 with d = log reference - log policy (Schulman 2020, "Approximating KL divergence", k3; Shao et al.
    2024, equation 4).
    """
    apart = reference - logps
    return apart.exp() - apart - 1


class Grpo(Policy):
    """Group relative policy optimization (Shao et al. 2024, DeepSeekMath, equations 3 and 4)."""

    kind: Literal["grpo"] = "grpo"
    """Make answers likelier that are better than the others to the same prompt (Shao et al. 2024)."""
    kl: NonNegativeFloat = 0.04
    """Weight of the distance from the model as this stage began, added to the loss of each token; 0.04 in the paper. 0
    needs no reference."""
    clip_high: PositiveFloat | None = None
    """Upper side of `clip`, when it is another one; 0.28 in DAPO (Yu et al. 2025, equation 10)."""
    scale: Literal["group", "none"] = "group"
    """Divide a group's advantages by the standard deviation of its rewards, as the paper does, or leave them as they
    are, so that prompts that are nearly always or never answered well weigh no more (Liu et al. 2025, Dr. GRPO)."""
    average: Literal["token", "answer", "budget"] = "token"
    """What the loss is averaged over: all tokens of a step (Yu et al. 2025, DAPO, equation 8); the tokens of each
    answer and then the answers, which makes each token of a long answer weigh less (Shao et al. 2024, equation 3); or
    answers times `max_new_tokens` (Liu et al. 2025, Dr. GRPO)."""

    @property
    def kl_weight(self) -> float:
        return self.kl

    def signals(self, rollout: Rollout) -> dict[str, Tensor]:
        """A = (r - mean of the group) / standard deviation of the group (Shao et al. 2024, section 4.1.2)."""
        groups = rollout.rewards.view(-1, rollout.group)
        advantages = groups - groups.mean(1, keepdim=True)
        # What rounding leaves of equal rewards is nothing to learn from, and Adam would not see how small it is.
        advantages[groups.amax(1) == groups.amin(1)] = 0.0
        if self.scale == "group":
            advantages = advantages / (groups.std(1, keepdim=True) + LEAST_DEVIATION)
        return {ADVANTAGES: advantages.view(-1)[rollout.answer_of_token()].float()}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        which, count = answers_of(batch)
        counted = {"token": len(which), "answer": count, "budget": count * self.max_new_tokens}[self.average]
        return {"policy": torch.tensor(float(counted), dtype=torch.float64)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, _ = token_logps(model, batch)
        ratio = (logps - batch.tensors[OLD]).exp()
        losses = clipped(ratio, batch.tensors[ADVANTAGES], self.clip, self.clip_high or self.clip)
        if self.kl:
            losses = losses + self.kl * distance_estimate(logps, batch.tensors[REFERENCE])
        if self.average == "answer":
            which, _ = answers_of(batch)
            losses = losses / torch.bincount(which)[which]
        return {"policy": losses.sum()}


class Rloo(Policy):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to basics", equations 4 and 8)."""

    kind: Literal["rloo"] = "rloo"
    """Make answers likelier that are better than the mean of the others to the same prompt (Ahmadian et al. 2024)."""
    kl: NonNegativeFloat = 0.05
    """What a nat of distance from the model as this stage began costs, taken off an answer's reward. 0 needs no
    reference."""

    @property
    def kl_weight(self) -> float:
        return self.kl

    def signals(self, rollout: Rollout) -> dict[str, Tensor]:
        """A = R - mean of the other answers' R, with R = r - kl (log policy - log reference) over the answer."""
        rewards = rollout.rewards - rollout.kl * rollout.summed(rollout.distances())
        groups = rewards.view(-1, rollout.group)
        others = (groups.sum(1, keepdim=True) - groups) / (rollout.group - 1)
        return {ADVANTAGES: (groups - others).view(-1)[rollout.answer_of_token()].float()}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"policy": torch.tensor(float(answers_of(batch)[1]), dtype=torch.float64)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """An answer is one action: its ratio is that of the whole (section 2.2), and one clip is for all its tokens."""
        logps, _ = token_logps(model, batch)
        which, count = answers_of(batch)
        moved = torch.zeros(count, device=logps.device).index_add(0, which, logps - batch.tensors[OLD])
        advantages = torch.zeros(count, device=logps.device)
        advantages[which] = batch.tensors[ADVANTAGES]
        return {"policy": clipped(moved.exp(), advantages, self.clip, self.clip).sum()}
