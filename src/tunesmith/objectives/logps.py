"""The one function that turns a model and a batch into log-probabilities of tokens."""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.batch import Batch
from tunesmith.models.forward import hidden_logps, next_token_logps
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
