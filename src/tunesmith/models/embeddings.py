"""What a model has learned of single tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tunesmith.models.streamed_head import ROWS_AT_ONCE, FileEmbedding

if TYPE_CHECKING:
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
    embedding = model.get_input_embeddings()
    asked = sorted(token for token in token_ids if token < len(cast(torch.Tensor, embedding.weight)))
    own, lengths, same = dict[int, torch.Tensor](), list[torch.Tensor](), Counter[int]()
    with torch.no_grad():
        start = 0
        for part in _parts(embedding):
            lengths.append(part.float().norm(dim=1))
            own |= {token: part[token - start].clone() for token in asked if start <= token < start + len(part)}
            start += len(part)
        for part in _parts(embedding):
            for token, vector in own.items():
                same[token] += int((part == vector).all(dim=1).sum())
        found = torch.cat(lengths)
        typical = float(found.median())
        return [token for token in asked if float(found[token]) < TINY * typical or same[token] > 1]


def _parts(embedding: nn.Module) -> Iterable[torch.Tensor]:
    """The table some rows at a time, so that it is never there once more in fp32."""
    if isinstance(embedding, FileEmbedding):
        return embedding.slices()
    return cast(torch.Tensor, embedding.weight).detach().split(ROWS_AT_ONCE)
