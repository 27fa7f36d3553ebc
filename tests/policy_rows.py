"""Answers to prompts as training rows, without a tokenizer or a job around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny import VOCABULARY
from tunesmith.batch import NO_PARENT, Example
from tunesmith.objectives import Policy
from tunesmith.objectives.policy import OLD, Rollout
from tunesmith.objectives.preference import REFERENCE

LENGTHS = ((4, 2, 5), (1, 6, 3))
"""Tokens of the answers to each of two prompts."""


def random_example(prompt: int, lengths: tuple[int, ...], generator: torch.Generator) -> Example:
    """A prompt of random tokens with random answers behind it."""
    total = prompt + sum(lengths)
    segments, start = [[0, prompt, NO_PARENT]], prompt
    for length in lengths:
        segments.append([start, length, 0])
        start += length
    weights = (torch.arange(total) >= prompt).float()
    ids = torch.randint(3, VOCABULARY, (total,), generator=generator)
    return Example(ids, {"target_weights": weights}, {"target_weights": "token"}, None, torch.tensor(segments))


def rollout_of(rewards: Any, *, kl: float = 0.1, values: Tensor | None = None, seed: int = 0) -> Rollout:
    """What a policy and its reference might say of answers of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length for group in LENGTHS for length in group])
    tokens = int(lengths.sum())
    logps = -4 + 0.3 * torch.randn(tokens, generator=generator)
    reference = logps + 0.2 * torch.randn(tokens, generator=generator)
    return Rollout(torch.tensor(rewards, dtype=torch.float64), len(LENGTHS[0]), lengths, logps, reference, values, kl)


def rows_of(objective: Policy, rollout: Rollout, logps: Tensor, seed: int = 1) -> list[Example]:
    """Rows that carry the signals of a rollout.

    Args:
        logps: of the policy that drew the answers, ``[tokens]``.
    """
    generator = torch.Generator().manual_seed(seed)
    signals = {OLD: logps, REFERENCE: rollout.reference, **objective.signals(rollout)}
    rows, start = [], 0
    for prompt, lengths in zip((5, 3), LENGTHS, strict=True):
        example = random_example(prompt, lengths, generator)
        end = start + sum(lengths)
        for name, tensor in signals.items():
            assert tensor is not None
            example.tensors[name], example.scopes[name] = tensor[start:end], "target"
        rows.append(example)
        start = end
    return rows
