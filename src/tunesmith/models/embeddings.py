"""The vocabulary of a model: tokens that are added to it, and what it has learned of single ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tunesmith.base import InputError
from tunesmith.models.streamed_head import ROWS_AT_ONCE, FileEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[str, int]:
    """Adds tokens to a tokenizer, and returns their ids. They are not special: answers are shown with them.

    Raises:
        InputError: when one is in the vocabulary already, or empty.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known or not token.strip():
            raise InputError(
                f"{token!r} is a token of this model already" if token.strip() else "a token has no text",
                where="model.add_tokens",
                fix="leave it out; method.trainable_tokens can name it",
            )
    tokenizer.add_tokens(list(tokens))
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in tokens}


def teach_tokens(model: nn.Module, added: dict[str, int]) -> None:
    """Makes room for tokens that were added to the tokenizer of ``model`` (on the meta device too).

    They start as the mean of all rows, in the embedding table and in the head (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"): the chance of every other token stays nearly what it was, and nothing
    is drawn at random. Rows that a table has beyond its vocabulary are taken first.
    """
    if not added:
        return
    table = cast(Any, model).get_input_embeddings()
    first = min(added.values())
    grow_vocabulary(model, max(len(table.weight), max(added.values()) + 1), known=min(first, len(table.weight)))
    cast(Any, model).get_input_embeddings().added_tokens = dict(added)


def grow_vocabulary(model: nn.Module, rows: int, known: int | None = None) -> None:
    """Gives embedding table and head ``rows`` rows; those from ``known`` on are the mean of the ones before them."""
    resized: Any = model
    known = len(resized.get_input_embeddings().weight) if known is None else known
    if rows != len(resized.get_input_embeddings().weight):
        resized.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (resized.get_input_embeddings(), resized.get_output_embeddings()):
            for tensor in () if module is None else (module.weight, getattr(module, "bias", None)):
                if tensor is not None:
                    tensor[known:] = tensor[:known].float().mean(dim=0).to(tensor.dtype)


def cover_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grows a model whose tokenizer knows tokens that it has no rows for: those that an adapter came with."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocabulary_rows(model):
        grow_vocabulary(model, needed)


def added_tokens(model: nn.Module) -> dict[str, int]:
    """Ids of the tokens that `teach_tokens` made room for."""
    return getattr(cast(Any, model).get_input_embeddings(), "added_tokens", {})


def vocabulary_rows(model: nn.Module) -> int:
    """Rows of the embedding table."""
    return len(cast(Any, model).get_input_embeddings().weight)
