"""Attention over segments, and the two ways in which a batch meets a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import random_rows, reference_logits, tiny
from tunesmith.batch import NO_PARENT, Batch, Example, pack
from tunesmith.models import attention, row_attention
from tunesmith.models.attention import UnsupportedAttention, segment_attention
from tunesmith.models.forward import next_token_logits, packing_obstacle

CAUSAL = nn.Module()


def dense_reference(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, **options: Any) -> Tensor:
    """Masked attention in fp64, one pair of tokens at a time decided from the definition of a segment."""
    window, causal = options.get("window"), options.get("causal", True)
    tokens = query.shape[2]
    owner, place = [0] * tokens, [0] * tokens
    depth: list[int] = []
    lineage: list[list[int]] = []
    for at, (start, length, parent) in enumerate(segments.tolist()):
        depth.append(0 if parent == NO_PARENT else depth[parent] + int(segments[parent, 1]))
        lineage.append([at] if parent == NO_PARENT else [*lineage[parent], at])
        for token in range(start, start + length):
            owner[token], place[token] = at, depth[at] + token - start
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for one in range(tokens):
        for other in range(tokens):
            related = owner[other] in lineage[owner[one]]
            distance = place[one] - place[other]
            near = window is None or distance < window
            allowed[one, other] = related and near and (distance >= 0 or not causal)
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * options.get("scaling", query.shape[3] ** -0.5)
    return (torch.softmax(scores.masked_fill(~allowed, -math.inf), -1) @ value).transpose(1, 2)


def random_segments(seed: int, parents: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    rows, start = [], 0
    for at, length in enumerate(lengths):
        parent = int(torch.randint(-1, at, (1,), generator=generator)) if parents and at else NO_PARENT
        rows.append([start, length, parent])
        start += length
    return torch.tensor(rows)


def queries_keys_values(segments: Tensor, heads: int, key_heads: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = int(segments[:, 1].sum())
    return tuple(
        torch.randn(1, count, tokens, 8, generator=generator, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How rows are computed: as products, as products of blocks of queries, or by torch's kernel one by one."""
    if request.param == "blocks":
        monkeypatch.setattr(row_attention, "BLOCK", 3)
    if request.param == "kernel":

        def one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, *settings: Any) -> Tensor:
            options = {"scaling": settings[0], "sliding_window": settings[1], "is_causal": True}
            whole = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
            return attention._one_by_one(*whole, segments, options)[0].flatten(1)

        monkeypatch.setattr(attention, "attend", one_by_one)
    row_attention.layout_of.cache_clear()
    yield request.param
    row_attention.layout_of.cache_clear()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parents", [False, True], ids=["roots", "ancestors"])
@pytest.mark.parametrize("window", [None, 3], ids=["whole", "window"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("way", ["products", "blocks", "kernel"], indirect=True)
def test_equals_dense_masked_attention(
    seed: int,
    parents: bool,
    window: int | None,
    heads: tuple[int, int],
    way: str,
) -> None:
    segments = random_segments(seed, parents)
    tensors = queries_keys_values(segments, *heads, seed=seed)
    found, _ = segment_attention(
        CAUSAL, *tensors, None, segments=segments, sliding_window=window, scaling=0.31, is_causal=True
    )
    expected = dense_reference(*tensors, segments=segments, window=window, scaling=0.31)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((found * probe).sum(), tensors)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * probe).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_without_causality_a_row_sees_itself_wholly() -> None:
    segments = random_segments(3, parents=False)
    tensors = queries_keys_values(segments, 4, 2)
    bidirectional = SimpleNamespace(is_causal=False)
    found, _ = segment_attention(bidirectional, *tensors, None, segments=segments)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(
        found.double(), dense_reference(*tensors, segments=segments, causal=False), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("way", ["products", "blocks", "kernel"], indirect=True)
def test_rows_do_not_see_each_other(way: str) -> None:
    segments = torch.tensor([[0, 5, NO_PARENT], [5, 1, NO_PARENT], [6, 7, NO_PARENT]])
    query, key, value = queries_keys_values(segments, 4, 2)
    found, _ = segment_attention(CAUSAL, query, key, value, None, segments=segments)
    for start, length, _ in segments.tolist():
        mine = slice(start, start + length)
        gradients = torch.autograd.grad(found[:, mine].square().sum(), (query, key, value), retain_graph=True)
        for gradient in gradients:
            outside = gradient.clone()
            outside[:, :, mine] = 0
            assert not outside.any()
            assert gradient[:, :, mine].any() or length == 1


def test_dropout_reaches_the_weights() -> None:
    segments = random_segments(0, parents=False)
    tensors = queries_keys_values(segments, 4, 2)
    plain, _ = segment_attention(CAUSAL, *tensors, None, segments=segments, dropout=0.0)
    dropped, _ = segment_attention(CAUSAL, *tensors, None, segments=segments, dropout=0.5)
    assert not torch.allclose(plain, dropped)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segments": None}, "does not pass segments"),
        ({"attention_mask": torch.ones(1)}, "does not pass segments"),
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.ones(4)}, "s_aux"),
        ({"position_bias": torch.ones(4)}, "position_bias"),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], reason: str) -> None:
    segments = random_segments(0, parents=False)
    options = {"attention_mask": None, "segments": segments, **change}
    with pytest.raises(UnsupportedAttention, match=reason):
        segment_attention(CAUSAL, *queries_keys_values(segments, 4, 2), **options)


MAY_PACK = ["llama", "gpt2", "qwen3", "gemma3_text", "phi3", "mixtral", "mistral"]
MUST_PAD = {
    "mamba": "change each other",
    "bloom": "change each other",
    "falcon": "change each other",
    "lfm2": "change each other",
    "gpt_oss": "attention with s_aux",
    "gemma2": "attention with softcap",
    "phimoe": "does not pass its sliding_window on",
    "llama4_text": "does not pass its attention_chunk_size on",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MAY_PACK)
def test_architectures_that_may_be_packed(model_type: str, dtype: torch.dtype) -> None:
    assert packing_obstacle(tiny(model_type, dtype=dtype)) is None


@pytest.mark.parametrize("initializer_range", [0.2, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MUST_PAD)
def test_architectures_that_must_be_padded(model_type: str, dtype: torch.dtype, initializer_range: float) -> None:
    model = tiny(model_type, dtype=dtype, initializer_range=initializer_range)
    assert MUST_PAD[model_type] in str(packing_obstacle(model))


def test_probing_leaves_no_trace() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    packing_obstacle(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks


LENGTHS = [17, 1, 5, 12]


def every_position(batch: Batch) -> Tensor:
    return torch.arange(batch.tokens)


@pytest.mark.parametrize("model_type", MAY_PACK)
def test_packed_equals_padded_equals_each_row_alone(model_type: str) -> None:
    model = tiny(model_type)
    rows = random_rows(LENGTHS)
    expected = torch.cat([reference_logits(model, row.token_ids) for row in rows])
    with torch.no_grad():
        packed = next_token_logits(model, pack(rows), torch.arange(sum(LENGTHS)))
        padded = next_token_logits(model, pack(rows, "padded"), torch.arange(sum(LENGTHS)))
    scale = float(expected.abs().max())
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "gpt_oss", "lfm2"])
def test_models_that_cannot_pack_are_right_when_padded(model_type: str) -> None:
    model = tiny(model_type)
    rows = random_rows(LENGTHS)
    expected = torch.cat([reference_logits(model, row.token_ids) for row in rows])
    with torch.no_grad():
        padded = next_token_logits(model, pack(rows, "padded"), torch.arange(sum(LENGTHS)))
    torch.testing.assert_close(padded, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("asked", [[], [0], [3, 16, 17, 18, 34], [34]], ids=str)
def test_logits_at_asked_positions_only(layout: Any, asked: list[int]) -> None:
    model = tiny("qwen3")
    batch = pack(random_rows(LENGTHS), layout)
    with torch.no_grad():
        whole = next_token_logits(model, batch, every_position(batch))
        some = next_token_logits(model, batch, torch.tensor(asked, dtype=torch.long))
    assert some.shape == (len(asked), whole.shape[1])
    torch.testing.assert_close(some, whole[asked], rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_select_logits_is_indexed() -> None:
    model = tiny()
    batch = pack(random_rows(LENGTHS))
    asked = torch.tensor([2, 20])
    with torch.no_grad():
        expected = next_token_logits(model, batch, asked)

    class Unselecting(type(model)):  # pyright: ignore[reportUntypedBaseClass]
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    model.__class__ = Unselecting
    for layout in ("packed", "padded"):
        with torch.no_grad():
            found = next_token_logits(model, pack(random_rows(LENGTHS), layout), asked)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_child_continues_its_parent() -> None:
    """A prompt with two answers as children gives each answer what it has behind the prompt alone."""
    model = tiny()
    prompt, one, other = (row.token_ids for row in random_rows([6, 4, 5]))
    batch = Batch(
        token_ids=torch.cat([prompt, one, other]),
        positions=torch.cat([torch.arange(6), torch.arange(6, 10), torch.arange(6, 11)]),
        segments=torch.tensor([[0, 6, NO_PARENT], [6, 4, 0], [10, 5, 0]]),
        tensors={},
        scopes={},
    )
    with torch.no_grad():
        found = next_token_logits(model, batch, every_position(batch))
    for answer, place in ((one, slice(6, 10)), (other, slice(10, 15))):
        expected = reference_logits(model, torch.cat([prompt, answer]))[6:]
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-5)
    padded = Batch(batch.token_ids, batch.positions, batch.segments, {}, {}, "padded")
    with pytest.raises(ValueError, match="cannot be padded"):
        next_token_logits(model, padded, every_position(padded))


def test_rows_without_anything_to_predict() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        pack([])
    lonely = pack([Example(torch.tensor([5]), {"target_weights": torch.zeros(1)}, {"target_weights": "token"})])
    assert next_token_logits(tiny(), lonely, torch.tensor([0])).shape == (1, 96)
