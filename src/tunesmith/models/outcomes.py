"""What may follow a token, as a few tokens and all others together: nothing is lost but the differences of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**23
"""Logits that exist in fp32 at a time, 32 MB, beside a few copies of the same size."""

Head = Callable[[Tensor], Tensor]
"""What makes logits ``[rows, vocabulary]`` of rows."""


class Outcomes(NamedTuple):
    """What a model says of chosen tokens.

    Attributes:
        logps: fp32 ``[n, k + 1]`` in nats at some temperature: the k chosen tokens, and in the last column all others
            together. ``[n, k]`` where the k are the whole vocabulary.
        targets: fp32 ``[n]``: log-probabilities of the targets, at temperature 1.
    """

    logps: Tensor
    targets: Tensor


def outcomes_of(
    rows: Tensor, head: Head, tokens: Tensor, targets: Tensor, temperature: float, vocabulary: int
) -> Outcomes:
    """Log-probabilities of chosen tokens and of the rest, with a gradient; logits exist for a few rows at a time.

    The mass of the rest is the sum over the other logits, never one minus what is chosen: a sure model's rest would be
    rounded away. Logits are computed once more in the backward pass.

    Args:
        rows: ``[n, …]``, what ``head`` makes logits of.
        tokens: int64 ``[n, k]``, different ones in each row.
        targets: int64 ``[n]``.
        temperature: logits are divided by it.
        vocabulary: number of logits, at most.
    """
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    parts = [
        cast(
            tuple[Tensor, Tensor],
            checkpoint(_outcomes, own, head, chosen, asked, temperature, use_reentrant=False),
        )
        for own, chosen, asked in zip(rows.split(size), tokens.split(size), targets.split(size), strict=True)
    ]
    return Outcomes(torch.cat([logps for logps, _ in parts]), torch.cat([targets for _, targets in parts]))


def _outcomes(rows: Tensor, head: Head, tokens: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(rows).float()
    scaled = logits if temperature == 1 else logits / temperature
    among = _with_rest(scaled, tokens)
    total = (among if temperature == 1 else logits).logsumexp(1)
    return among.log_softmax(1), logits.gather(1, targets[:, None]).squeeze(1) - total


def likeliest(
    rows: Tensor, head: Head, count: int, temperature: float, vocabulary: int, *, spare: bool
) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens of each row with their log-probabilities, the likeliest first; no gradient.

    Args:
        vocabulary: tokens there are to choose from; what logits there are beyond counts for nothing.
        spare: whether there must always be a rest, so that one token at least is not chosen.

    Returns:
        Tokens, int64 ``[n, k]``, and log-probabilities as in `Outcomes`; k is ``count``, or all that may be chosen.
    """
    count = min(count, vocabulary - spare)
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    found, logps = [], []
    with torch.no_grad():
        for own in rows.split(size):
            logits = head(own)[:, :vocabulary].float() / temperature
            tokens = logits.topk(count, dim=1).indices
            found.append(tokens)
            logps.append(_with_rest(logits, tokens).log_softmax(1))
    return torch.cat(found), torch.cat(logps)


def _with_rest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits of chosen tokens, and behind them that of all others together, if there are others."""
    among = logits.gather(1, tokens)
    if tokens.shape[1] == logits.shape[1]:
        return among
    rest = logits.scatter(1, tokens, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([among, rest], 1)
