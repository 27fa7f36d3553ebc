"""What a model and a batch become before any loss: log-probabilities of the targets, or of what else may follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.forward import hidden_logps, hidden_outcomes, next_token_logps, next_token_outcomes
from tunesmith.objectives.objective import TargetLogps


def token_logps(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> TargetLogps:
    """log p(token i | the tokens before it in its segment) for each token whose ``target_weights`` is positive.

    Logits are computed at those positions only, never for the whole batch. A token that opens a root segment has
    nothing before it and must not be a target. ``smoothing`` as in `next_token_logps`.
    """
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)  # [chosen]
    features = batch.tensors.get("features")
    if features is not None:  # the trunk has run already
        return TargetLogps(hidden_logps(model, features, batch.token_ids[chosen], smoothing), chosen)
    return TargetLogps(next_token_logps(model, batch, batch.before(chosen), batch.token_ids[chosen], smoothing), chosen)


class TargetOutcomes(NamedTuple):
    """What a model says at the targets of a batch, in their order.

    Attributes:
        outcomes: fp32 ``[chosen, k + 1]``: log-probabilities of k tokens and of all others together, as
            `models.outcomes.Outcomes`.
        logps: fp32 ``[chosen]``: of the targets, at temperature 1.
        chosen: int64 ``[chosen]``: positions of those targets in the batch.
    """

    outcomes: Tensor
    logps: Tensor
    chosen: Tensor


def token_outcomes(model: nn.Module, batch: Batch, tokens: Tensor, temperature: float) -> TargetOutcomes:
    """How likely, at each target, each of ``tokens`` ``[targets, k]`` is, and all else together, and the target."""
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)  # [chosen]
    targets, features = batch.token_ids[chosen], batch.tensors.get("features")
    if features is not None:
        found = hidden_outcomes(model, features, targets, tokens, temperature)
    else:
        found = next_token_outcomes(model, batch, batch.before(chosen), targets, tokens, temperature)
    return TargetOutcomes(found.logps, found.targets, chosen)
