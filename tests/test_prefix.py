"""A prefix as one ancestor of all rows: exact to a copy before every row, and to PEFT, on every kind of block."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from steps import assert_same, gradients
from tiny import random_rows, tiny
from tunesmith.base import InputError
from tunesmith.batch import NO_PARENT, pack
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods import Prefix, trainable_parameters
from tunesmith.methods.adapted import without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.prefix import PrefixedEmbedding
from tunesmith.methods.prompt import prompted
from tunesmith.models.attention import attend, behind_ancestor
from tunesmith.models.decoder import Decoder, decoder_of
from tunesmith.models.forward import next_token_logits
from tunesmith.models.row_attention import Rows, row_attention
from tunesmith.objectives import Supervised
from tunesmith.recipe import TrainSpec
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = random_rows((9, 17, 12, 30))
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gemma3_text", "mixtral"]
GENERAL = ["phi3", "gpt2", "gemma3_text", "mixtral"]


def moved(family: str = "llama", tokens: int = 5, **fields: Any) -> nn.Module:
    """A model with a prefix that training has moved."""
    model = tiny(family)
    torch.manual_seed(3)
    Prefix(tokens=tokens, init="random", **fields).adapt(model)
    optimizer = build_optimizer(model.train(), TrainSpec(), 5e-2)
    for _ in range(3):
        assert step(model, Supervised(), optimizer, [pack(ROWS)]).applied
    return model.eval()


def logits(model: nn.Module, layout: Any = "packed") -> Tensor:
    batch = pack(ROWS, layout)
    with torch.no_grad():
        return next_token_logits(model, batch, torch.arange(batch.tokens)).float()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=5).map(tuple),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.integers(1, 6),
    st.sampled_from([None, 3, 9]),
    st.integers(0, 3),
)
def test_one_ancestor_is_a_copy_before_every_row(
    lengths: tuple[int, ...], heads: tuple[int, int], before: int, window: int | None, filler: int
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    shapes = [(tokens + filler, heads[0]), (tokens + filler, heads[1]), (tokens + filler, heads[1])]
    own = [torch.randn(*shape, 4, requires_grad=True) for shape in shapes]
    ancestor = tuple(torch.randn(before, heads[1], 4, requires_grad=True) for _ in range(2))
    segments = torch.tensor([[sum(lengths[:at]), length, NO_PARENT] for at, length in enumerate(lengths)])
    found = row_attention(*own, Rows(lengths), 0.3, window, ancestor)[:tokens]
    (query, key, value, moved), places = behind_ancestor(*own, segments, ancestor)
    expected = row_attention(query, key, value, Rows(tuple(moved[:, 1].tolist())), 0.3, window)[places]
    weights = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tensors = [*own, *ancestor]
    ours = torch.autograd.grad((found * weights).sum(), tensors, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_ancestor_stands_before_the_parents_of_segments() -> None:
    torch.manual_seed(0)
    own = [torch.randn(9, 2, 4) for _ in range(3)]
    ancestor = (torch.randn(3, 2, 4), torch.randn(3, 2, 4))
    shared = torch.tensor([[0, 4, NO_PARENT], [4, 2, 0], [6, 3, 0]])
    found = attend(*own, shared, 0.3, None, ancestor)
    for start, stop in ((4, 6), (6, 9)):
        row = [torch.cat([tensor[:4], tensor[start:stop]]) for tensor in own]
        alone = row_attention(*row, Rows((len(row[0]),)), 0.3, None, ancestor)
        torch.testing.assert_close(found[start:stop], alone[4:])
        torch.testing.assert_close(found[:4], alone[:4])


def test_it_gives_what_a_copy_in_every_row_gave() -> None:
    """Against prefix tokens that run through all layers in front of each row."""
    model = moved()
    embedding, decoder = cast(PrefixedEmbedding, prompted(model)), cast(Decoder, decoder_of(model))
    ids = torch.tensor(embedding.prompt_ids)
    rows = [torch.cat([ids, row.token_ids]) for row in ROWS]
    segments = torch.tensor([[0, len(row), NO_PARENT] for row in rows])
    segments[:, 0] = segments[:, 1].cumsum(0) - segments[:, 1]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    hidden = decoder.hidden(torch.cat(rows), positions, decoder.within(segments))
    expected = decoder.logits(hidden[torch.cat([torch.arange(len(row)) >= len(ids) for row in rows])])
    batch = pack(ROWS)
    found = next_token_logits(model, batch, torch.arange(batch.tokens))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((some * weights).sum(), embedding.prompt)[0] for some in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("tokens", [5, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits_and_answers(family: str, tokens: int, tmp_path: Path) -> None:
    model = moved(family, tokens)
    expected = logits(model)
    torch.testing.assert_close(logits(model, "padded"), expected, rtol=1e-4, atol=2e-4)
    Prefix(tokens=tokens).save(model, tmp_path, base="base")
    theirs: Any = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    with torch.no_grad():
        found = torch.cat([theirs(input_ids=row.token_ids[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-4)
    again = tiny(family)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected)
    with without_adapter(model):
        torch.testing.assert_close(logits(model), logits(tiny(family)))
    prompts = [[5, 17, 3], [40, 41, 9, 12, 55, 20, 31], [5]]
    answers = generate(model, prompts, Sampling(8), stop_ids={2}, batch_size=4, progress=lambda *_: None)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens_of = next_greedy(model, prompt, 8)
        assert answer.token_ids == tokens_of


def next_greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Answers without any cache."""
    from tunesmith.batch import Example

    row = list(prompt)
    for _ in range(count):
        batch = pack([Example(torch.tensor(row))])
        with torch.no_grad():
            token = int(next_token_logits(model, batch, torch.tensor([len(row) - 1])).argmax())
        if token == 2:
            break
        row.append(token)
    return row[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", *GENERAL])
def test_recomputing_and_splitting_change_nothing(family: str) -> None:
    model = moved(family).train()
    plain, _ = gradients(model, Supervised(), [pack(ROWS)])
    parts, _ = gradients(model, Supervised(), [pack(ROWS[:1]), pack(ROWS[1:], "padded")])
    assert_same(parts, plain, 1e-4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, _ = gradients(model, Supervised(), [pack(ROWS)])
    assert_same(again, plain, 1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_text_gives_the_keys_and_values_that_the_base_has_for_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.methods import prefix

    ids = torch.tensor([7, 12, 9, 33])
    monkeypatch.setattr(prefix, "text_ids", lambda model, text, count: ids)
    model = tiny(family)
    Prefix(tokens=4).adapt(model)
    row = random_rows((8,))[0].token_ids
    with torch.no_grad():
        whole = tiny(family)(input_ids=torch.cat([ids, row])[None]).logits[0, 4:]
    batch = pack(random_rows((8,)))
    found = next_token_logits(model, batch, torch.arange(8))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
def test_models_without_attention_over_segments_are_refused(family: str, tmp_path: Path) -> None:
    from conftest import build_model, colour_rows, write_jsonl
    from tunesmith.pipeline.finetune import finetune
    from tunesmith.recipe_file import check_recipe

    overrides = {"head_dim": 8} if family == "gemma2" else {"state_size": 4}
    model = build_model(tmp_path / "model", family, **overrides)
    rows = write_jsonl(tmp_path / "rows.jsonl", colour_rows(8))
    recipe = {"model": str(model), "data": {"train": str(rows)}, "method": {"kind": "prefix", "tokens": 3}}
    with pytest.raises(InputError, match=r"prefix needs attention over segments|keys and values"):
        finetune(check_recipe({**recipe, "output": str(tmp_path / "run")}, "test"))
    assert not (tmp_path / "run").exists()


def test_a_reparameterised_prefix_starts_where_it_is_told_and_is_folded_away(tmp_path: Path) -> None:
    plain, model = tiny(), tiny()
    torch.manual_seed(3)
    Prefix(tokens=5, init="random").adapt(plain)
    torch.manual_seed(3)
    method = Prefix(tokens=5, init="random", reparameterize=16)
    method.adapt(model)
    torch.testing.assert_close(logits(model), logits(plain))
    width = 2 * 2 * 16
    expected = 5 * 16 + 16 * 17 + width * 17
    assert sum(p.numel() for p in trainable_parameters(model).values()) == expected
    trained = moved(reparameterize=16)
    method.save(trained, tmp_path, base="base")
    theirs = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    with torch.no_grad():
        found = torch.cat([theirs(input_ids=row.token_ids[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(found, logits(trained), rtol=1e-4, atol=3e-4)
    assert not torch.allclose(found, logits(plain), atol=1e-2)
