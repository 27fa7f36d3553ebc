"""The one function that turns a model and a batch into log-probabilities of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.models.forward import next_token_logps


class TokenLogps(NamedTuple):
    """Log-probabilities of the chosen tokens, in the order of the batch.

    Attributes:
        logps: fp32 ``[chosen]``, in nats.
        chosen: int64 ``[chosen]``: positions of those tokens in the batch.
    """

    logps: Tensor
    chosen: Tensor


def token_logps(model: nn.Module, batch: Batch) -> TokenLogps:
    """log p(token i | the tokens before it in its segment) for each token whose ``target_weights`` is positive.

    Logits are computed at those positions only, never for the whole batch. A token that opens a root segment has
    nothing before it and must not be a target.
    """
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)  # [chosen]
    return TokenLogps(next_token_logps(model, batch, chosen - 1, batch.token_ids[chosen]), chosen)
