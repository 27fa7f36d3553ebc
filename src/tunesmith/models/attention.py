"""Attention over segments of one packed sequence, registered through transformers' own interface.

A segment attends causally to itself and wholly to its ancestors, so rows laid end to end never see each other, and
no [tokens × tokens] mask is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.batch import NO_PARENT

SEGMENTS = "tunesmith_segments"


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
        UnsupportedAttention: without segments, on several rows, or for soft-capped and sink attention.
    """
    segments = options.get("segments")
    if segments is None or query.shape[0] != 1 or attention_mask is not None:
        raise UnsupportedAttention("the model does not pass segments on to its attention layers")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedAttention(f"attention with {name}")
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    pieces = []
    for start, length, parent in segments.tolist():
        keys, values = _with_ancestors(segments, key, value, start, length, parent)
        mask = _mask(length, keys.shape[2], causal, options.get("sliding_window"), query.device)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, start : start + length],
                keys,
                values,
                attn_mask=mask,
                dropout_p=options.get("dropout") or 0.0,
                is_causal=causal and mask is None and length > 1,
                scale=options.get("scaling"),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    output = torch.cat(pieces, dim=2)  # [1, heads, tokens, head_dim]
    return output.transpose(1, 2).contiguous(), None


def _with_ancestors(
    segments: Tensor, key: Tensor, value: Tensor, start: int, length: int, parent: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of a segment, those of its ancestors before them, oldest first."""
    keys, values = [key[:, :, start : start + length]], [value[:, :, start : start + length]]
    while parent != NO_PARENT:
        start, length, parent = segments[parent].tolist()
        keys.insert(0, key[:, :, start : start + length])
        values.insert(0, value[:, :, start : start + length])
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))


def _mask(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look; None where plain causal attention says the same."""
    windowed = window is not None and keys > window
    if not windowed and (keys == queries or not causal):
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)  # [queries, keys]
    return allowed & (distance < window) if windowed and window is not None else allowed


AttentionInterface.register(SEGMENTS, segment_attention)
