"""Causal attention inside rows that lie end to end, as batched matrix products with a gradient written by hand.

A row is a segment, which sees the segments that it descends from too: what several answers share is computed once, and
only its keys and values stand beside each of them.

The CPU's fused attention kernel is slow backward, and autograd would keep several copies of the scores. Rows of like
length are laid beside each other as one batch of products; queries of one key-value head are laid end to end, so that
keys and values are never repeated. Long rows are cut into blocks of queries, and what queries take of keys is computed
again in the backward pass, so that memory grows with the tokens and not with their square (Dao et al. 2022, section
3.1, by rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Ancestor = tuple[Tensor | None, Tensor | None]
"""Keys and values ``[ancestors, key_heads, head_dim]`` that stand before every row, or none."""

BLOCK = 512
"""Queries of a block."""

EVEN = 8
"""The longest row of a group is made a multiple of this: unaligned rows of scores are slow, and each length new to the
library of products costs it a kernel."""

WASTE = 1.25
"""Rows share a batch of products while padding makes it at most this much larger."""


@dataclass(frozen=True)
class Group:
    """Rows whose products are one batch, padded to the longest of them.

    Attributes:
        rows, longest: how many, and tokens of the longest.
        queries: int64 ``[rows * heads * longest]``: for each slot of the padded batch the row of ``[tokens * heads]``
            that fills it; the slots are ordered by row, key-value head, query head of it, position.
        keys: the same for ``[tokens * key_heads]``.
        padding: slots of the queries that are none.
        before: keys of the longest line of ancestors, which stand before a row's own keys.
        hidden: bool ``[rows, before]``: keys before a shorter line, which nobody sees; None where there are none.
    """

    rows: int
    longest: int
    queries: Tensor
    keys: Tensor
    padding: Tensor | None
    before: int = 0
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How packed tokens become batches of products, and back.

    Attributes:
        groups: which follow each other.
        from_queries: int64 ``[tokens * heads]``: the slot, counted over all groups, where each query was put.
        from_keys: the same for keys and values; one that stands in several slots has its number behind all slots.
        shared: int64 ``[shared keys, copies]``: for each of those its slots, filled up with one behind all slots; None
            where no key stands in several.
        covered: tokens that belong to a row.
    """

    groups: tuple[Group, ...]
    from_queries: Tensor
    from_keys: Tensor
    covered: int
    heads: int
    key_heads: int
    shared: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows that lie end to end.

    Attributes:
        lengths: tokens of each.
        parents: for each the row that it goes on from, or -1; empty where no row goes on from another.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()

    def ancestors(self, row: int) -> list[int]:
        """The rows that one goes on from, the oldest first."""
        family: list[int] = []
        while self.parents and (row := self.parents[row]) >= 0:
            family.insert(0, row)
        return family


@lru_cache(maxsize=16)
def layout_of(rows: Rows, tokens: int, heads: int, key_heads: int, device: torch.device) -> Layout:
    """The layout of rows, which lie end to end; of ``tokens`` the rest belongs to no row."""
    lengths = rows.lengths
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    lines = [
        torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(starts[at], starts[at + 1]) for at in family)])
        for family in map(rows.ancestors, range(len(lengths)))
    ]
    groups, query_slots = [], torch.zeros(tokens, heads, dtype=torch.long)
    key_slots = torch.zeros(tokens, key_heads, dtype=torch.long)
    copies: list[tuple[Tensor, Tensor]] = []
    query_base, key_base = 0, 0
    for members in _groups(lengths, [len(line) for line in lines]):
        longest, count = max(lengths[row] for row in members), len(members)
        longest += -longest % EVEN
        offsets = torch.arange(longest)
        own = torch.tensor([lengths[row] for row in members])[:, None]
        token = torch.tensor([starts[row] for row in members])[:, None] + torch.minimum(offsets, own - 1)
        real = offsets < own  # [rows, longest]
        before, hidden = _before(token[:, 0], [lines[row] for row in members])
        queries, q_slot = _slots(token, heads)
        keys, k_slot = _slots(torch.cat([before, token], dim=1), key_heads)
        query_slots[token[real]] = query_base + q_slot.permute(0, 2, 1)[real]
        k_slot = key_base + k_slot.permute(0, 2, 1)  # [rows, before + longest, key heads]
        key_slots[token[real]] = k_slot[:, before.shape[1] :][real]
        copies.append((before[~hidden], k_slot[:, : before.shape[1]][~hidden]))
        fill = ~real[:, None, :].expand(-1, heads, -1)
        padding = q_slot[fill] if bool(fill.any()) else None
        groups.append(
            Group(
                count,
                longest,
                queries.to(device),
                keys.to(device),
                None if padding is None else padding.to(device),
                before.shape[1],
                hidden.to(device) if bool(hidden.any()) else None,
            )
        )
        query_base += count * heads * longest
        key_base += count * key_heads * (before.shape[1] + longest)
    shared = _shared(key_slots, copies, key_base)
    slots = query_slots.reshape(-1).to(device), key_slots.reshape(-1).to(device)
    return Layout(tuple(groups), *slots, starts[-1], heads, key_heads, None if shared is None else shared.to(device))


def _before(first: Tensor, lines: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens of the ancestors of rows, ``[rows, longest line]``, shorter lines at the end; and which are none."""
    longest = max(len(line) for line in lines)
    tokens, hidden = first[:, None].repeat(1, longest), torch.ones(len(lines), longest, dtype=torch.bool)
    for row, line in enumerate(lines):
        tokens[row, longest - len(line) :] = line
        hidden[row, longest - len(line) :] = False
    return tokens, hidden


def _shared(key_slots: Tensor, copies: list[tuple[Tensor, Tensor]], slots: int) -> Tensor | None:
    """All slots of keys that have several; such a key is then looked for behind all ``slots`` in ``key_slots``."""
    tokens, places = (torch.cat([pair[part] for pair in copies]) for part in (0, 1))
    if not len(tokens):
        return None
    order = torch.argsort(tokens, stable=True)
    tokens, places = tokens[order], places[order]  # [copies], [copies, key heads]
    which, row, counts = torch.unique_consecutive(tokens, return_inverse=True, return_counts=True)
    nth = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[row]
    found = torch.full((len(which), key_slots.shape[1], 1 + int(counts.max())), slots)
    found[:, :, 0] = key_slots[which]
    found[row, :, 1 + nth] = places
    key_slots[which] = slots + 1 + torch.arange(found[:, :, 0].numel()).view(len(which), -1)
    return found.view(-1, found.shape[2])


def forget_layouts() -> None:
    """Frees what is kept of lengths that were met: a mask each, which is as large as the square of a length."""
    layout_of.cache_clear()
    _bias.cache_clear()


def _groups(lengths: tuple[int, ...], before: list[int]) -> list[list[int]]:
    """Rows by length, put together while padding wastes little; long ones alone.

    Args:
        before: for each row how many tokens its ancestors have.
    """
    groups: list[list[int]] = []
    real, line = 0, 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], before[row])):
        length = lengths[row]
        own, longest = length * (length + before[row]), max(line, before[row])
        whole = length * (length + longest) * (len(groups[-1]) + 1) if groups else 0
        if groups and length <= BLOCK and whole <= WASTE * (real + own):
            groups[-1].append(row)
            real, line = real + own, longest
        else:
            groups.append([row])
            real, line = own, before[row]
    return groups


def _slots(token: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """For ``[rows, longest]`` tokens the rows of ``[tokens * heads]`` in the order of slots, and the slots' numbers."""
    rows, longest = token.shape
    source = token[:, None, :] * heads + torch.arange(heads)[:, None]  # [rows, heads, longest]
    return source.reshape(-1), torch.arange(rows * heads * longest).view(rows, heads, longest)


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scaling: float,
    window: int | None,
    ancestor: Ancestor = (None, None),
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), causal, inside each row.

    Args:
        query: ``[tokens, heads, head_dim]``; key, value: ``[tokens, key_heads, head_dim]``.
        rows: what follows the last one belongs to none, and what is returned for it means nothing.
        window: how many tokens a query sees, itself among them; None for all.
        ancestor: keys and values ``[ancestors, key_heads, head_dim]`` that stand before every row.

    Returns:
        ``[tokens, heads * value_dim]``.
    """
    layout = layout_of(rows, *query.shape[:2], key.shape[1], query.device)
    return cast(Tensor, _RowAttention.apply(query, key, value, layout, scaling, window, *ancestor))


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scaling: float,
        window: int | None,
        *ancestor: Tensor | None,
    ) -> Tensor:
        ctx.layout, ctx.scaling, ctx.window = layout, scaling, window
        outputs = []
        for group in layout.groups:
            queries, keys, values, before = _gathered(query, key, value, group, layout, ancestor)
            output = []
            for first, last in _blocks(group.longest):
                shares = _shares(queries, keys, (first, last), scaling, window, group.hidden)
                seen = values[:, : before + last]
                output.append(torch.bmm(shares.flatten(1, 2), seen).view(*shares.shape[:3], -1))
            whole = torch.cat(output, dim=2) if len(output) > 1 else output[0]  # [rows * key heads, group, longest, …]
            outputs.append(whole.reshape(-1, value.shape[-1]))
        ctx.save_for_backward(query, key, value, *ancestor)
        flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return flat.index_select(0, layout.from_queries).view(len(query), -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, value, *ancestor = ctx.saved_tensors
        layout = cast(Layout, ctx.layout)
        gradient = grad_outputs[0].contiguous().view(-1, value.shape[-1])
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        d_ancestor = [None if given is None else torch.zeros_like(given) for given in ancestor]
        for group in layout.groups:
            queries, keys, values, before = _gathered(query, key, value, group, layout, ancestor)
            slopes = gradient.index_select(0, group.queries)
            if group.padding is not None:
                slopes.index_fill_(0, group.padding, 0)
            slopes = slopes.view(*queries.shape[:3], -1)
            d_queries = []
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for first, last in _blocks(group.longest):
                shares = _shares(queries, keys, (first, last), ctx.scaling, ctx.window, group.hidden)
                slope = slopes[:, :, first:last].flatten(1, 2)
                flat = shares.flatten(1, 2)
                reach = before + last
                d_values[:, :reach].baddbmm_(flat.transpose(1, 2), slope)
                d_shares = torch.bmm(slope, values[:, :reach].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_shares, flat, -1, flat.dtype)
                asked = queries[:, :, first:last].flatten(1, 2)
                d_query = torch.baddbmm(asked, d_scores, keys[:, :reach], beta=0, alpha=ctx.scaling)
                d_queries.append(d_query.view(*shares.shape[:3], -1))
                d_keys[:, :reach].baddbmm_(d_scores.transpose(1, 2), asked, alpha=ctx.scaling)
            whole = torch.cat(d_queries, dim=2) if len(d_queries) > 1 else d_queries[0]
            more = before - group.before
            for total, of_rows in zip(d_ancestor, (d_keys, d_values), strict=True):
                if total is not None:
                    own = of_rows[:, :more].reshape(group.rows, layout.key_heads, more, -1)
                    total += own.sum(dim=0).transpose(0, 1)
            for pieces, piece in zip(found, (whole, d_keys[:, more:], d_values[:, more:]), strict=True):
                pieces.append(piece.reshape(-1, piece.shape[-1]))
        flats = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found]
        d_query = flats[0].index_select(0, layout.from_queries).view_as(query)
        d_key, d_value = (
            _of_keys(flat, layout).view_as(given) for flat, given in zip(flats[1:], (key, value), strict=True)
        )
        for slope in (d_query, d_key, d_value) if layout.covered < len(query) else ():
            slope[layout.covered :] = 0
        return d_query, d_key, d_value, None, None, None, *d_ancestor


def _of_keys(slopes: Tensor, layout: Layout) -> Tensor:
    """What slots got, ``[slots, head_dim]``, added up for every key: ``[tokens * key_heads, head_dim]``."""
    if layout.shared is not None:
        slopes = F.pad(slopes, (0, 0, 0, 1))
        several = slopes.index_select(0, layout.shared.flatten()).view(*layout.shared.shape, -1)
        slopes = torch.cat([slopes, several.sum(dim=1)])
    return slopes.index_select(0, layout.from_keys)


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, group: Group, layout: Layout, ancestor: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``[rows * key heads, heads of each, longest, head_dim]``, twice ``[rows * key heads, keys, head_dim]``, and how
    many of these keys come before the row's own: the ancestor's, and those of rows that it goes on from."""
    batch, share = group.rows * layout.key_heads, layout.heads // layout.key_heads
    queries = query.reshape(-1, query.shape[-1]).index_select(0, group.queries)
    keys = key.reshape(-1, key.shape[-1]).index_select(0, group.keys)
    values = value.reshape(-1, value.shape[-1]).index_select(0, group.keys)
    longest, before = group.longest, group.before
    keys, values = keys.view(batch, before + longest, -1), values.view(batch, before + longest, -1)
    if ancestor[0] is not None and ancestor[1] is not None:
        before += len(ancestor[0])
        keys, values = (
            torch.cat([given.transpose(0, 1).repeat(group.rows, 1, 1), own], dim=1)
            for given, own in zip(cast(Sequence[Tensor], ancestor), (keys, values), strict=True)
        )
    return queries.view(batch, share, longest, -1), keys, values, before


def _blocks(longest: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK, longest)) for first in range(0, longest, BLOCK)]


def _shares(
    queries: Tensor,
    keys: Tensor,
    block: tuple[int, int],
    scaling: float,
    window: int | None,
    hidden: Tensor | None,
) -> Tensor:
    """How much each query of a block takes of each key before its end: ``[batch, heads of each, queries, keys]``."""
    first, last = block
    before = keys.shape[1] - queries.shape[2]  # keys of ancestors, as if the row had begun with them
    bias = _bias(before + first, before + last, window, queries.dtype, queries.device)
    share = queries.shape[1]
    # The mask rides along in the product; filling it in afterwards would pass over the scores twice more.
    scores = torch.baddbmm(
        bias.repeat(share, 1).expand(len(queries), -1, -1),
        queries[:, :, first:last].flatten(1, 2),
        keys[:, : before + last].transpose(1, 2),
        alpha=scaling,
    )
    if hidden is not None:  # they stand right before the row's own keys
        there = slice(before - hidden.shape[1], before)
        nobodys = hidden.repeat_interleave(len(queries) // len(hidden), dim=0)[:, None, :]
        scores[:, :, there].masked_fill_(nobodys, float("-inf"))
    return torch.softmax(scores, dim=-1).view(len(queries), share, last - first, before + last)


@lru_cache(maxsize=64)
def _bias(first: int, last: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero where a query of ``first … last`` may look, minus infinity elsewhere: ``[queries, keys]``."""
    distance = torch.arange(first, last, device=device)[:, None] - torch.arange(last, device=device)
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(last - first, last, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))
