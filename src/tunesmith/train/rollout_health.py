"""Notices policies that learn nothing or fall apart: a flat reward, answers all alike, a model left behind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.base import TrainingError

PATIENCE = 5
"""Rollouts in a row after which something is said aloud."""
LEAST_ENTROPY = 0.02
"""Nats a token below which nothing is left to be drawn."""
LARGEST_GAP, TOO_LARGE_GAP = 0.1, 1.0
"""Nats a token between what a server that drew the answers and this process find of them: from the first on it is said
aloud; from the second on the server has another model, and its answers say nothing of this one."""
FARTHEST = 1.0
"""Nats a token between policy and reference beyond which little of the model is left."""


@dataclass(frozen=True)
class Seen:
    """What the answers of a rollout were like, over all processes.

    Attributes:
        reward, reward_std: mean and standard deviation over answers.
        kl: mean over answers of log policy - log reference, in nats an answer; ``kl_of_token`` in nats a token; None
            where nothing is compared with a reference.
        entropy: an estimate of the policy's entropy, in nats a token: minus the mean log-probability of what it drew.
        length: mean tokens of an answer, its ending included.
        cut: share of answers that the limit cut.
        flat: share of prompts whose answers are all worth the same; None with one answer a prompt.
        alike: share of prompts whose answers are all the same text; with one answer a prompt, whether those to all
            prompts are.
        server_gap: mean distance between a token's log-probability here and on the server that drew it, in nats; None
            where this process drew it.
    """

    reward: float
    reward_std: float
    kl: float | None
    kl_of_token: float | None
    entropy: float
    length: float
    cut: float
    flat: float | None
    alike: float
    server_gap: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class RolloutHealth:
    """How many rollouts in a row have shown each sign; a sign is told once it has lasted, and again when it returns.

    Attributes:
        spread: whether any rollout has ever had answers that were worth more than others.
    """

    signs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIGNS, 0))
    rollouts: int = 0
    spread: bool = False

    def observe(self, seen: Seen, *, last: bool) -> list[str]:
        """Takes a rollout in, and gives what is to be said aloud.

        Args:
            last: whether no more answers will be drawn.

        Raises:
            TrainingError: at the end, when no answer was ever worth more than another; and when the server that drew
                the answers has another model than this process.
        """
        self.rollouts += 1
        self.spread = self.spread or not _is_flat(seen)
        present = {
            "flat": _is_flat(seen),
            "alike": seen.alike == 1.0,
            "sure": seen.entropy < LEAST_ENTROPY,
            "far": seen.kl_of_token is not None and seen.kl_of_token > FARTHEST,
        }
        told = _of_server(seen)
        for name, shows in present.items():
            self.signs[name] = self.signs[name] + 1 if shows else 0
            if self.signs[name] == PATIENCE:
                told.append(SIGNS[name].format(reward=seen.reward, kl=seen.kl_of_token or 0.0, entropy=seen.entropy))
        if last and not self.spread:
            raise TrainingError(
                f"the reward was constant: all answers to a prompt were worth the same (on average {seen.reward:.3g}) "
                f"in all {self.rollouts} rollouts, so nothing could be learned",
                fix="reward parts of what is asked too, start from a model that sometimes succeeds (fine-tune it "
                "first), raise objective.group_size, or look at the answers in events.jsonl",
            )
        return told

    def tensor(self) -> Tensor:
        """int64 ``[signs + 2]``."""
        return torch.tensor([*self.signs.values(), self.rollouts, int(self.spread)])

    @classmethod
    def of(cls, stored: Tensor) -> RolloutHealth:
        *counts, rollouts, spread = stored.tolist()
        return cls(dict(zip(SIGNS, counts, strict=True)), rollouts, bool(spread))


SIGNS = {
    "flat": f"the reward has been constant ({{reward:.3g}}) over the answers to each prompt for {PATIENCE} rollouts: "
    "nothing is learned from them",
    "alike": f"the policy may be collapsing: its answers to each prompt have all been alike for {PATIENCE} rollouts; "
    "raise objective.kl or lower train.learning_rate",
    "sure": f"the policy may be collapsing: its entropy has been below {LEAST_ENTROPY} nats a token for {PATIENCE} "
    "rollouts ({entropy:.3g}); raise objective.kl or lower train.learning_rate",
    "far": f"the policy has left the model it started from: more than {FARTHEST:g} nat a token for {PATIENCE} rollouts "
    "({kl:.3g}); raise objective.kl or lower train.learning_rate",
}
"""What is said of each sign."""


def _of_server(seen: Seen) -> list[str]:
    gap = seen.server_gap or 0.0
    if gap < LARGEST_GAP:
        return []
    what = f"the server that draws the answers and this process are {gap:.3g} nats a token apart about them"
    if gap >= TOO_LARGE_GAP:
        raise TrainingError(
            f"{what}: it has another model",
            fix="serve the weights that this job starts from, in the same dtype and quantization",
        )
    return [f"{what}: the answers are not quite this policy's; serve the same weights in the same dtype"]


def _is_flat(seen: Seen) -> bool:
    return seen.reward_std < 1e-9 if seen.flat is None else seen.flat == 1.0
