"""Proximal policy optimization with a value head on the same model (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.forward import hidden_at
from tunesmith.models.head import has_plain_head
from tunesmith.models.value_head import values_at
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.policy import ADVANTAGES, LEAST_DEVIATION, OLD, Policy, Rollout, clipped
from tunesmith.objectives.task import FEATURES

VALUES, RETURNS = "old_values", "returns"
"""Names of the tensors of a batch, fp32 ``[targets]``: what the value head said when the answer was drawn, and what it
should have said."""
LARGEST_ERROR = 0.2
"""To which the relative error of the KL controller is clipped (Ziegler et al. 2019, section 2.2)."""
CONTROLLER_GAIN = 0.1
"""By how much of that error its weight changes in a step (the same)."""


class Ppo(Policy):
    """Clipped policy and value losses with generalized advantage estimation."""

    kind: Literal["ppo"] = "ppo"
    """Make tokens likelier after which more reward came than a value head expected (Schulman et al. 2017; for language
    models Ziegler et al. 2019 and Stiennon et al. 2020)."""
    group_size: PositiveInt = 1
    """Answers drawn to each prompt. A step has `train.batch_size` prompts, and this many answers to each."""
    passes: PositiveInt = 4
    """Optimizer steps that are taken with the same answers before new ones are drawn."""
    kl: NonNegativeFloat = 0.05
    """What a nat of distance from the model as this stage began costs, taken off the reward token by token. 0 needs no
    reference."""
    kl_target: PositiveFloat | None = None
    """Distance in nats an answer that `kl` is steered to: it rises while answers are farther away and falls while they
    are nearer, by a tenth of the relative error, which is clipped at 0.2 (Ziegler et al. 2019, section 2.2). Without it
    `kl` stays as it is."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """How much a reward one token later is worth."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation (Schulman et al. 2016, equation 16): 0 believes the value head, 1 the
    rewards that came."""
    value_clip: PositiveFloat = 0.2
    """How far a value may move from what it was when the answer was drawn before a step stops gaining by it."""
    value_weight: PositiveFloat = 0.1
    """Weight of the value loss beside the policy's."""
    whiten_rewards: bool = False
    """Divide the rewards of tokens by their standard deviation over a step's answers before advantages are computed."""

    terms: ClassVar[tuple[str, ...]] = ("policy", "value")
    has_values: ClassVar[bool] = True

    @property
    def kl_weight(self) -> float:
        return self.kl

    def next_kl_weight(self, weight: float, distance: float) -> float:
        """The controller of Ziegler et al. 2019, section 2.2."""
        if self.kl_target is None:
            return weight
        error = (distance - self.kl_target) / self.kl_target
        return weight * (1 + CONTROLLER_GAIN * max(-LARGEST_ERROR, min(LARGEST_ERROR, error)))

    def signals(self, rollout: Rollout) -> dict[str, Tensor]:
        """Whitened advantages, and returns: advantages before whitening plus values."""
        assert rollout.values is not None
        rewards = -rollout.kl * rollout.distances()
        rewards[rollout.lengths.cumsum(0) - 1] += rollout.rewards.float()
        if self.whiten_rewards:
            rewards = whitened(rewards, keeps_mean=True)
        advantages = estimated_advantages(rewards, rollout.values, rollout.lengths, self.gamma, self.lam)
        return {
            ADVANTAGES: whitened(advantages),
            RETURNS: advantages + rollout.values,
            VALUES: rollout.values,
        }

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        tokens = (batch.tensors["target_weights"] > 0).sum().double()
        return {"policy": tokens, "value": tokens}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, values = logps_and_values(model, batch)
        ratio = (logps - batch.tensors[OLD]).exp()
        policy = clipped(ratio, batch.tensors[ADVANTAGES], self.clip, self.clip)
        value = value_losses(values, batch.tensors[VALUES], batch.tensors[RETURNS], self.value_clip)
        return {"policy": policy.sum(), "value": self.value_weight * value.sum()}


def logps_and_values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """log-probability of every target, and the value of what stands before it; fp32 ``[targets]`` both.

    The trunk runs once where the model's own head is a plain product of the last hidden states.
    """
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    hidden = hidden_at(model, batch, batch.before(chosen))
    if has_plain_head(model):
        batch = replace(batch, tensors={**batch.tensors, FEATURES: hidden})
    return token_logps(model, batch).logps, values_at(model, hidden)


def estimated_advantages(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, equations 11 and 16), answer by answer.

    A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t; behind an answer's last token both are 0.

    Args:
        rewards, values: fp32 ``[tokens]``, answer after answer.
        lengths: int64 ``[answers]``.
    """
    ends = set((lengths.cumsum(0) - 1).tolist())
    found, later, after = list[float](), 0.0, 0.0
    for at, (reward, value) in reversed(list(enumerate(zip(rewards.tolist(), values.tolist(), strict=True)))):
        if at in ends:
            later = after = 0.0
        later = reward + gamma * after - value + gamma * lam * later
        found.append(later)
        after = value
    return torch.tensor(found[::-1], dtype=rewards.dtype)


def whitened(values: Tensor, *, keeps_mean: bool = False) -> Tensor:
    """Divided by their standard deviation, and around 0 unless the mean is to stay: ``[tokens]``."""
    if len(values) < 2:
        return values
    mean = values.mean()
    scaled = (values - mean) / (values.std() + LEAST_DEVIATION)
    return scaled + mean if keeps_mean else scaled


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger squared error of the value and of the value held near where it was: fp32 ``[targets]``.

    Source: OpenAI's baselines (PPO2), as in Ziegler et al. 2019's code.
    """
    near = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
