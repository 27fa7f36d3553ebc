"""What preference training did to better and worse answers, beside the metrics: by how much each became likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.evaluation.answers import Judged, implicit_rewards
from tunesmith.evaluation.compare import PERPLEXITY


def preference_summary(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Any] | None:
    """Log-likelihoods of both answers before and after, and what follows from them; None without pairs.

    Its accuracy is the share of pairs in which the implicit reward of the better answer is the larger one.
    """
    both = [(b, t) for b, t in zip(before, after, strict=True) if b.targets and t.targets]
    found = [(b, t, rewards) for b, t in both if (rewards := implicit_rewards(b, t)) is not None]
    if not found:
        return None
    pairs, gains = [(b, t) for b, t, _ in found], [rewards for _, _, rewards in found]
    count = len(pairs)

    def mean(values: Sequence[float | int | None]) -> float:
        return sum(value or 0.0 for value in values) / count

    return {
        "pairs": count,
        "reward_accuracy": mean([float(better > worse) + 0.5 * (better == worse) for better, worse in gains]),
        "reward_margin": mean([better - worse for better, worse in gains]),
        "chosen_logps": [-mean([b.nll for b, _ in pairs]), -mean([t.nll for _, t in pairs])],
        "rejected_logps": [-mean([b.other_nll for b, _ in pairs]), -mean([t.other_nll for _, t in pairs])],
        "chosen_tokens": mean([b.targets for b, _ in pairs]),
        "rejected_tokens": mean([b.other_targets for b, _ in pairs]),
    }


def preference_sentence(found: dict[str, Any]) -> str:
    """The summary in words."""
    chosen, rejected = found["chosen_logps"], found["rejected_logps"]
    return (
        f"log-likelihood of better answers {chosen[0]:.1f} → {chosen[1]:.1f} nats, of worse ones {rejected[0]:.1f} → "
        f"{rejected[1]:.1f} ({found['chosen_tokens']:.0f} and {found['rejected_tokens']:.0f} tokens on average); "
        f"implicit reward: margin {found['reward_margin']:+.1f} nats, larger for the better answer in "
        f"{found['reward_accuracy']:.0%} of {found['pairs']} pairs"
    )


def falling_likelihood(metrics: Sequence[dict[str, Any]]) -> str | None:
    """A warning where better answers became less likely too, beyond the interval; None where they did not."""
    entry = next((entry for entry in metrics if entry["name"] == PERPLEXITY), None)
    if entry is None or entry["low"] is None or entry["low"] <= 0:
        return None
    return (
        f"the better answers became less likely too: their perplexity went from {entry['base']:.2f} to "
        f"{entry['tuned']:.2f}; a lower learning rate, a larger beta or objective.nll_weight keeps them"
    )
