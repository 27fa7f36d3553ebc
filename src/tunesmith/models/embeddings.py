"""What a model has learned of single tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from transformers import PreTrainedModel

TINY = 0.01
"""Share of the median length below which a vector cannot have been learned."""


def untrained_tokens(model: PreTrainedModel, token_ids: Collection[int]) -> list[int]:
    """Those of ``token_ids`` whose input embedding was never trained, as far as one can see.

    Vocabularies reserve control tokens that pretraining never shows: their vectors are left near zero (Llama 3's base),
    or were all set to one and the same value.

    Args:
        token_ids: tokens that a template writes.
    """
    with torch.no_grad():
        vectors = cast(torch.Tensor, model.get_input_embeddings().weight).detach().float()  # [vocabulary, hidden]
        lengths = vectors.norm(dim=1)
        typical = float(lengths.median())
        found = []
        for token in sorted(token_ids):
            if token >= len(vectors):
                continue
            same = int((vectors == vectors[token]).all(dim=1).sum())
            if float(lengths[token]) < TINY * typical or same > 1:
                found.append(token)
    return found
