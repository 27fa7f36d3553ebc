"""Attention over segments of one packed sequence, registered through transformers' own interface.

A segment attends causally to itself and wholly to its ancestors, so rows laid end to end never see each other, and
no [tokens × tokens] mask is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from tunesmith.batch import NO_PARENT

SEGMENTS = "tunesmith_segments"
EXPLICIT_LONGEST = 512
"""Tokens up to which plain matrix products beat the CPU's fused kernel, and their memory does not matter."""


class UnsupportedAttention(Exception):
    """The architecture asks for something that attention over segments does not compute."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1) within segments.

    Args:
        module: the attention layer that calls.
        query: ``[1, heads, tokens, head_dim]``.
        key, value: ``[1, key_value_heads, tokens, head_dim]``.
        attention_mask: unused; `segments` says it all.
        options: ``segments`` as in `Batch`, and what transformers passes (``scaling``, ``dropout``,
            ``sliding_window`` …).

    Returns:
        ``[1, tokens, heads, head_dim]`` and None for the attention weights, which are not kept.

    Raises:
        UnsupportedAttention: without segments, on several rows, for soft-capped and sink attention, or when the
            architecture keeps a window to its masks.
    """
    segments = options.get("segments")
    if segments is None or query.shape[0] != 1 or attention_mask is not None:
        raise UnsupportedAttention("the model does not pass segments on to its attention layers")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"attention with {name}")
    _refuse_hidden_window(module, options)
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    longest = int(segments[:, 1].max())
    alone = bool((segments[:, 2] == NO_PARENT).all())
    if query.device.type == "cpu" and alone and causal and longest <= EXPLICIT_LONGEST:
        output = _explicit(query, key, value, segments, options)
    else:
        output = _one_by_one(query, key, value, segments, {**options, "is_causal": causal})
    return output.contiguous(), None


def _refuse_hidden_window(module: nn.Module, options: dict[str, Any]) -> None:
    """Some architectures put a window into their masks only, and a row shorter than it would not show the loss."""
    config = getattr(module, "config", None)
    for name in ("attention_chunk_size", "sliding_window"):
        # A stray key in config.json is an attribute too; one that the architecture reads is declared by its class.
        if hasattr(type(config), name) and getattr(config, name) and name not in options:
            raise UnsupportedAttention(f"the model does not pass its {name} on to its attention layers")


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, options: dict[str, Any]) -> Tensor:
    """Each segment through torch's fused kernel. Returns ``[1, tokens, heads, head_dim]``."""
    causal = options["is_causal"]
    lengths = segments[:, 1].tolist()
    # Splitting has a cheap backward pass; slicing would fill a whole tensor with zeros for every piece.
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    pieces = []
    for at, length in enumerate(lengths):
        family = _ancestors(segments, at)
        seen_keys = torch.cat([keys[member] for member in family], dim=2) if len(family) > 1 else keys[at]
        seen_values = torch.cat([values[member] for member in family], dim=2) if len(family) > 1 else values[at]
        mask = _mask(length, seen_keys.shape[2], causal, options.get("sliding_window"), query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                queries[at],
                seen_keys,
                seen_values,
                attn_mask=mask,
                dropout_p=options.get("dropout") or 0.0,
                is_causal=causal and mask is None and length > 1,
                scale=options.get("scaling"),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _explicit(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, options: dict[str, Any]) -> Tensor:
    """Root segments as one batch of plain matrix products, padded to the longest of them.

    The CPU's fused kernel is slow in its backward pass; for short rows these products are several times faster.
    Keys of the padding come after every real query, so the causal mask hides them. Queries of one key-value head are
    laid end to end, so that keys and values are never repeated.

    Returns:
        ``[1, tokens, heads, head_dim]``.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[3]
    group, count, longest = heads // key_heads, segments.shape[0], int(segments[:, 1].max())
    lengths = segments[:, 1].tolist()
    offsets = torch.arange(longest)
    real = (offsets < segments[:, 1:2]).reshape(-1).nonzero().squeeze(1)  # rows of the padded batch, in packed order

    def batched(tensor: Tensor) -> Tensor:
        rows = tensor[0].transpose(0, 1).split(lengths)
        return pad_sequence(list(rows), batch_first=True).transpose(1, 2)  # [segments, heads, longest, head_dim]

    scale = options.get("scaling") or width**-0.5
    queries = (batched(query) * scale).reshape(count * key_heads, group * longest, width)
    keys = batched(key).reshape(count * key_heads, longest, width)
    mask = _mask(longest, longest, True, options.get("sliding_window"), query.device)
    allowed = torch.ones(longest, longest, dtype=torch.bool).tril() if mask is None else mask
    bias = torch.zeros(longest, longest, dtype=query.dtype).masked_fill(~allowed, float("-inf")).repeat(group, 1)
    # The mask rides along in the product; filling it in afterwards would pass over the scores twice more.
    scores = torch.baddbmm(bias.expand(count * key_heads, -1, -1), queries, keys.transpose(1, 2))
    shares = torch.softmax(scores, dim=-1)  # [segments * key heads, group * longest, longest]
    if dropout := options.get("dropout"):
        shares = F.dropout(shares, dropout)
    output = torch.bmm(shares, batched(value).reshape(count * key_heads, longest, -1))
    output = output.view(count, heads, longest, -1).transpose(1, 2).reshape(count * longest, heads, -1)
    return output.index_select(0, real)[None]


def _ancestors(segments: Tensor, at: int) -> list[int]:
    """The segments that one attends to: its ancestors, oldest first, and itself."""
    family = [at]
    while (parent := int(segments[family[0], 2])) != NO_PARENT:
        family.insert(0, parent)
    return family


def _mask(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look; None where plain causal attention says the same."""
    windowed = window is not None and keys > window
    if not windowed and (keys == queries or not causal):
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)  # [queries, keys]
    return allowed & (distance < window) if windowed and window is not None else allowed


AttentionInterface.register(SEGMENTS, segment_attention)
