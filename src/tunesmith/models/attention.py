"""Attention over segments of one packed sequence, registered through transformers' own interface.

A segment attends causally to itself and wholly to its ancestors, so rows laid end to end never see each other, and
no [tokens × tokens] mask is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.batch import NO_PARENT
from tunesmith.models.projection import compute_dtype
from tunesmith.models.row_attention import Ancestor, Rows, row_attention

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
        options: ``segments`` as in `Batch`, ``ancestors`` of every layer if there are some, and what transformers
            passes (``scaling``, ``dropout``, ``sliding_window`` …).

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
    if causal and not options.get("dropout"):
        # Under autocast rotary positions widen queries and keys, and values stay narrow.
        asked, keys, values = (tensor[0].transpose(0, 1).to(compute_dtype(query)) for tensor in (query, key, value))
        scaling = options.get("scaling") or query.shape[3] ** -0.5
        ancestor = _ancestor_of(module, options.get("ancestors"), keys.dtype)
        output = attend(asked, keys, values, segments, scaling, options.get("sliding_window"), ancestor)
        return output.view(1, query.shape[2], query.shape[1], -1), None
    if options.get("ancestors") is not None:
        raise UnsupportedAttention("attention that is not causal, or has dropout")
    return _one_by_one(query, key, value, segments, {**options, "is_causal": causal}).contiguous(), None


def _ancestor_of(module: nn.Module, ancestors: Any, dtype: torch.dtype) -> Ancestor:
    """What stands before every row in this layer."""
    if ancestors is None:
        return None, None
    key, value = ancestors[cast(Any, module).layer_idx]
    return key.to(dtype), value.to(dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    scaling: float,
    window: int | None,
    ancestor: Ancestor = (None, None),
) -> Tensor:
    """Causal attention of packed tokens by the way that is fastest for them.

    Args:
        query: ``[tokens, heads, head_dim]``; key, value: ``[tokens, key_heads, head_dim]``.
        segments: as in `Batch`; tokens behind the last one belong to none, and what is returned for them means nothing.
        window: how many tokens a query sees, itself among them; None for all.
        ancestor: keys and values ``[ancestors, key_heads, head_dim]`` that all segments attend to, as if each family
            of them began there.

    Returns:
        ``[tokens, heads * head_dim]``.
    """
    alone = bool((segments[:, 2] == NO_PARENT).all())
    # A window counts from keys before all rows through padding, where lines of ancestors differ in length.
    if query.device.type == "cpu" and (alone or window is None or ancestor[0] is None):
        lengths, parents = (tuple(segments[:, part].tolist()) for part in (1, 2))
        return row_attention(query, key, value, Rows(lengths, () if alone else parents), scaling, window, ancestor)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and (alone or ancestor[0] is None):
        if ancestor[0] is None:
            return _flash(query, key, value, segments, scaling, window)
        rows, own = behind_ancestor(query, key, value, segments, ancestor)
        return F.pad(_flash(*rows, scaling, window)[own], (0, 0, 0, len(query) - len(own)))
    whole = query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    options = {"scaling": scaling, "sliding_window": window, "is_causal": True, "ancestor": ancestor}
    return _one_by_one(*whole, segments, options)[0].flatten(1)


def behind_ancestor(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, ancestor: Ancestor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Rows with a copy of the ancestor before each, for kernels that take no others; its queries are read by nobody.

    Returns:
        Query, key, value and segments of them, and int64 ``[tokens]``: where each token of the rows stands now.
    """
    lengths, more = segments[:, 1], len(cast(Tensor, ancestor[0]))
    starts = (lengths + more).cumsum(0) - lengths - more
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    own = torch.arange(len(row)) + more * (row + 1)
    index = torch.full((int((lengths + more).sum()),), -1)
    index[own] = more + torch.arange(len(row))
    index[index < 0] = torch.arange(more).repeat(len(lengths))
    index, own = index.to(query.device), own.to(query.device)
    found = [
        torch.cat([query.new_zeros(more, *tensor.shape[1:]) if first is None else first, tensor]).index_select(0, index)
        for first, tensor in zip((None, *ancestor), (query, key, value), strict=True)
    ]
    moved = torch.stack([starts, lengths + more, torch.full_like(lengths, NO_PARENT)], dim=1)
    return (found[0], found[1], found[2], moved), own


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scaling: float, window: int | None) -> Tensor:
    """All rows in one call of the flash kernel for rows of any length (Dao 2023).

    Keys and values that rows share are copied before those of each; the last query of a row sees its last key, as the
    kernel has it where there are more keys than queries.
    """
    from torch.nn.attention.varlen import varlen_attn

    lengths = seen_lengths = segments[:, 1]
    if bool((segments[:, 2] != NO_PARENT).any()):
        families = [_ancestors(segments, at) for at in range(len(segments))]
        whole = [torch.arange(start, start + length) for start, length, _ in segments.tolist()]
        index = torch.cat([whole[member] for family in families for member in family]).to(query.device)
        key, value = key.index_select(0, index), value.index_select(0, index)
        seen_lengths = torch.tensor([sum(int(lengths[member]) for member in family) for family in families])
    ends, seen_ends = (F.pad(part.cumsum(0), (1, 0)).to(query.device, torch.int32) for part in (lengths, seen_lengths))
    reach = (-1 if window is None else window - 1, 0)
    found = varlen_attn(
        query,
        key,
        value,
        ends,
        seen_ends,
        int(lengths.max()),
        int(seen_lengths.max()),
        scale=scaling,
        window_size=reach,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, found).flatten(1)


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
    filler = query.shape[2] - sum(lengths)
    # Splitting has a cheap backward pass; slicing would fill a whole tensor with zeros for every piece.
    queries, keys, values = (tensor.split([*lengths, filler], dim=2) for tensor in (query, key, value))
    pieces = []
    before = [[] if given is None else [given.transpose(0, 1)[None]] for given in options.get("ancestor", (None, None))]
    for at, length in enumerate(lengths):
        family = _ancestors(segments, at)
        seen_keys, seen_values = (
            torch.cat([*first, *(tensor[member] for member in family)], dim=2)
            if first or len(family) > 1
            else tensor[at]
            for first, tensor in zip(before, (keys, values), strict=True)
        )
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
    return torch.cat([*pieces, torch.zeros_like(queries[-1])], dim=2).transpose(1, 2)


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


def use_attention(model: nn.Module, name: str) -> None:
    language_model = cast(Any, model)
    if language_model.config._attn_implementation != name:
        from transformers import AttentionInterface  # whose module brings all that a model of transformers may need

        AttentionInterface.register(SEGMENTS, segment_attention)
        language_model.set_attn_implementation(name)


def use_default_attention(model: nn.Module) -> None:
    """Puts back transformers' own attention, which generation and padded batches need."""
    use_attention(model, default_attention(model))


@contextmanager
def as_transformers_runs_it(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and transformers' own attention, both put back afterwards."""
    training, attention = model.training, cast(Any, model).config._attn_implementation
    model.eval()
    use_default_attention(model)
    try:
        yield
    finally:
        model.train(training)
        use_attention(model, attention)


def default_attention(model: nn.Module) -> str:
    """The attention that transformers would choose by itself: `sdpa` where the architecture has it."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
