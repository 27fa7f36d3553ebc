"""Attention of packed rows as batches of products: where each token is put, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.models import row_attention as module
from tunesmith.models.row_attention import EVEN, WASTE, Rows, layout_of, row_attention

CPU = torch.device("cpu")
SCALING, HEAD_DIM = 0.31, 4
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])
small = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that most rows are cut."""
    monkeypatch.setattr(module, "BLOCK", 5)
    layout_of.cache_clear()
    yield
    layout_of.cache_clear()


@small
@given(LENGTHS, HEADS)
def test_every_query_and_key_has_one_slot_and_the_rest_is_padding(
    lengths: tuple[int, ...], heads: tuple[int, int]
) -> None:
    layout = layout_of(Rows(lengths), sum(lengths), *heads, CPU)
    for sources, slots in (
        (torch.cat([group.queries for group in layout.groups]), layout.from_queries),
        (torch.cat([group.keys for group in layout.groups]), layout.from_keys),
    ):
        assert torch.equal(sources[slots], torch.arange(len(slots)))  # so no slot is used twice
    first, padding = 0, set()
    for group in layout.groups:
        if group.padding is not None:
            padding |= set((group.padding + first).tolist())
        first += len(group.queries)
    assert padding == set(range(first)) - set(layout.from_queries.tolist())
    assert sum(group.rows for group in layout.groups) == len(lengths)


@small
@given(LENGTHS)
def test_rows_share_a_batch_only_while_padding_is_small_and_long_ones_are_alone(lengths: tuple[int, ...]) -> None:
    left = sorted(lengths)
    for group in layout_of(Rows(lengths), sum(lengths), 1, 1, CPU).groups:
        members, left = left[: group.rows], left[group.rows :]
        assert group.longest % EVEN == 0 and group.longest - EVEN < members[-1] <= group.longest
        assert group.rows * members[-1] ** 2 <= WASTE * sum(length**2 for length in members)
        assert group.rows == 1 or members[-1] <= module.BLOCK
    assert not left


@small
@given(LENGTHS, HEADS)
def test_tokens_behind_the_last_row_change_nothing_and_get_no_gradient(
    lengths: tuple[int, ...], heads: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    long = [torch.randn(tokens + 3, count, 4, requires_grad=True) for count in (heads[0], heads[1], heads[1])]
    short = [tensor[:tokens].detach().requires_grad_() for tensor in long]
    found, expected = (row_attention(*tensors, Rows(lengths), SCALING, None) for tensors in (long, short))
    assert torch.equal(found[:tokens], expected) and bool(found.isfinite().all())
    weights = torch.randn_like(expected)
    (found[:tokens] * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(long, short, strict=True):
        assert torch.equal(one.grad[:tokens], other.grad) and not bool(one.grad[tokens:].any())


def attention(tensors: list[Tensor], lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    query, key, value = tensors
    return row_attention(query, key, value, Rows(lengths), SCALING, window)


def expected_attention(tensors: list[Tensor], lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """torch's own kernel, row by row, in fp64."""
    rows = []
    for asked, seen, taken in zip(*(tensor.double().split(lengths) for tensor in tensors), strict=True):
        distance = torch.arange(len(asked))[:, None] - torch.arange(len(asked))
        mask = (distance >= 0) & (distance < (window or len(asked)))
        asked, seen, taken = (tensor.transpose(0, 1)[None] for tensor in (asked, seen, taken))
        found = F.scaled_dot_product_attention(asked, seen, taken, attn_mask=mask, scale=SCALING, enable_gqa=True)
        rows.append(found[0].transpose(0, 1).flatten(1))
    return torch.cat(rows)


@small
@given(LENGTHS, HEADS, st.sampled_from([None, 1, 3]))
def test_equals_torch_row_by_row(lengths: tuple[int, ...], heads: tuple[int, int], window: int | None) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    tensors = [
        torch.randn(sum(lengths), count, HEAD_DIM, generator=generator, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    found = attention(tensors, lengths, window)
    expected = expected_attention(tensors, lengths, window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn(found.shape, generator=generator)
    gradients = torch.autograd.grad((found * probe).sum(), tensors)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * probe).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_shares_are_not_kept() -> None:
    """What is kept for the backward pass grows with the tokens: query, key and value alone."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    tensors = [torch.randn(16, 2, HEAD_DIM, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(tensors, (4, 12))
    assert [tuple(tensor.shape) for tensor in kept] == [(16, 2, HEAD_DIM)] * 3


def test_a_narrow_dtype_stays_and_is_as_good_as_it_can_be() -> None:
    lengths = (3, 11)
    tensors = [
        torch.randn(14, 2, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1, 2)
    ]
    found = attention(tensors, lengths)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected_attention(tensors, lengths), rtol=2e-2, atol=2e-2)


FAMILIES = [
    ((7, 5, 3), (-1, 0, 0)),
    ((7, 5, 3, 9, 4, 20), (-1, 0, 0, -1, 3, 3)),
    ((4, 6, 2, 3, 5, 1, 12), (-1, 0, 1, 1, 0, -1, -1)),
    ((1, 1, 1), (-1, 0, 1)),
    ((600, 530, 3, 40), (-1, 0, 0, -1)),
]


@pytest.mark.parametrize(("lengths", "parents"), FAMILIES)
@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_share_their_beginning_are_like_copies_of_it(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None
) -> None:
    """Output and gradients, against every line of rows copied out and run by itself."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = Rows(lengths, parents), sum(lengths) + 3
    query, key, value = (torch.randn(tokens, heads, 4, generator=generator).requires_grad_() for heads in (4, 2, 2))
    slope = torch.randn(sum(lengths), 16, generator=generator)
    found = row_attention(query, key, value, rows, SCALING, window)[: sum(lengths)]
    gradients = torch.autograd.grad((found * slope).sum(), (query, key, value))
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    expected = []
    for row in range(len(lengths)):
        line = torch.cat([torch.arange(starts[at], starts[at] + lengths[at]) for at in (*rows.ancestors(row), row)])
        alone = row_attention(query[line], key[line], value[line], Rows((len(line),)), SCALING, window)
        expected.append(alone[-lengths[row] :])
    wanted = torch.cat(expected)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad((wanted * slope).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
