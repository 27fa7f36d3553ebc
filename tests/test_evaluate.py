"""Likelihoods and answers are the model's own, however rows are laid out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import colour_rows
from tunesmith.base import InputError, Source
from tunesmith.batch import Example
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.engine.generate import Sampling, generate
from tunesmith.evaluation.answers import Judging, judge, mean_nll, prompt_text, row_nlls
from tunesmith.evaluation.forgetting import LONGEST, MOST_PASSAGES, general_passages
from tunesmith.models.templates import resolve_template


def quiet(*_: object) -> None:
    pass


# --- likelihoods and answers ---


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    of = AutoTokenizer.from_pretrained(tiny_model)
    return Renderer(resolve_template("auto", of), of, "answers", {of.eos_token_id})


def rows(renderer: Renderer, count: int) -> list[Any]:
    found = []
    for at, fields in enumerate(colour_rows(count), start=1):
        question = fields["prompt"] + " please" * (at % 4 * 3)
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": fields["completion"]})
        found.append(renderer.render(Row(Source("rows", at), turns, references=(fields["completion"],))))
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_likelihoods_equal_the_loss_of_transformers(packed: bool, model: Any, renderer: Renderer) -> None:
    examples = [item.example for item in rows(renderer, 11)]
    seen: list[tuple[str, int, int | None]] = []
    found = row_nlls(model, examples, packed=packed, progress=lambda *given: seen.append(given))
    for example, nll in zip(examples, found, strict=True):
        labels = example.token_ids.masked_fill(example.tensors["target_weights"] == 0, -100)
        with torch.no_grad():
            loss = model(input_ids=example.token_ids[None], labels=labels[None]).loss
        assert nll == pytest.approx(loss.item() * example.targets, rel=1e-4)
    assert mean_nll(model, examples, packed=packed) == pytest.approx(
        sum(found) / sum(example.targets for example in examples), rel=1e-6
    )
    assert seen[-1] == ("scoring", 11, 11) and not model.training


@pytest.mark.parametrize("packed", [True, False])
def test_likelihoods_do_not_depend_on_the_neighbours(
    packed: bool, model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [item.example for item in rows(renderer, 9)]
    together = row_nlls(model, examples, packed=packed, progress=quiet)
    backwards = row_nlls(model, examples[::-1], packed=packed, progress=quiet)
    monkeypatch.setattr("tunesmith.evaluation.answers.TOKENS_AT_ONCE", 1)
    alone = row_nlls(model, examples, packed=packed, progress=quiet)
    assert together == pytest.approx(alone, rel=1e-4)
    assert together == pytest.approx(backwards[::-1], rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_without_targets_have_no_likelihood_to_lose(packed: bool, model: Any) -> None:
    def example(weights: list[float]) -> Example:
        ids = torch.arange(3, 3 + len(weights))
        return Example(ids, {"target_weights": torch.tensor(weights)}, {"target_weights": "token"})

    silent = example([0.0, 0.0, 0.0])
    assert row_nlls(model, [silent, silent], packed=packed, progress=quiet) == [0.0, 0.0]
    mixed = row_nlls(model, [silent, example([0.0, 0.0, 1.0]), silent], packed=packed, progress=quiet)
    assert mixed[0] == mixed[2] == 0.0 and mixed[1] > 0
    assert row_nlls(model, [], packed=packed, progress=quiet) == []


def test_training_mode_is_put_back(model: Any, renderer: Renderer) -> None:
    model.train()
    try:
        row_nlls(model, [item.example for item in rows(renderer, 2)], packed=True, progress=quiet)
        assert model.training
    finally:
        model.eval()


def test_answers_in_a_batch_equal_answers_alone(model: Any, renderer: Renderer) -> None:
    """Prompts of different lengths share a batch, padded on the left."""
    prompts = [item.prompt_ids for item in rows(renderer, 9)]
    assert len({len(prompt) for prompt in prompts}) > 3
    # a token that this random model says sooner or later, so that some answers stop and some are cut
    common = generate(model, prompts[:1], Sampling(8), stop_ids={2}, batch_size=1, progress=quiet)[0].token_ids[3]

    def answered(batch_size: int) -> list[Any]:
        return generate(model, prompts, Sampling(8), stop_ids={2, common}, batch_size=batch_size, progress=quiet)

    alone = answered(1)
    assert answered(9) == alone and answered(4) == alone
    assert {answer.finish_reason for answer in alone} == {"stop", "length"}
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in answer.token_ids:
                assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token
                ids.append(token)
            after = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        assert (after in (2, common)) == (answer.finish_reason == "stop") or len(answer.token_ids) == 8
        assert common not in answer.token_ids and 2 not in answer.token_ids


def test_rows_are_judged_in_their_order(model: Any, renderer: Renderer) -> None:
    items = rows(renderer, 5)
    raw = renderer.render(Row(Source("rows", 6), text="Say red 0 red"))
    how = Judging(4, 2, frozenset({2}), packed=True)
    found = judge(model, renderer.tokenizer, [*items[:3], raw, *items[3:]], how, quiet)
    assert [row.source for row in found] == ["rows:1", "rows:2", "rows:3", "rows:6", "rows:4", "rows:5"]
    assert (found[3].answer, found[3].finish_reason, found[3].references, found[3].prompt) == (None, None, [], "")
    assert found[0].prompt == items[0].row.messages[0]["content"] and found[0].references == ["RED red"]
    assert all(row.answer is not None and row.nll is not None and row.targets for row in found if row is not found[3])
    silent = judge(model, renderer.tokenizer, items, Judging(4, 2, frozenset({2}), packed=True, generates=False), quiet)
    assert {row.answer for row in silent} == {None}
    with torch.no_grad():
        broken = torch.nn.Module.get_parameter(model, "lm_head.weight").clone()
        model.lm_head.weight.fill_(math.nan)
        try:
            [dead] = judge(
                model, renderer.tokenizer, items[:1], Judging(4, 2, frozenset({2}), packed=True, generates=False), quiet
            )
        finally:
            model.lm_head.weight.copy_(broken)
    assert dead.nll is None and dead.as_json()["nll"] is None


def test_prompts_are_shown_as_people_read_them(renderer: Renderer) -> None:
    turns = (
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A"},
    )
    item = renderer.render(Row(Source("rows", 1), turns, references=("A",)))
    assert prompt_text(item) == "system: Be\nuser: Hi"


# --- general text ---


def test_general_text_of_the_recipe(tmp_path: Path, renderer: Renderer) -> None:
    of = renderer.tokenizer
    assert general_passages("off", of, 256) is None
    path = tmp_path / "general.txt"
    path.write_text("\n\n".join(f"Passage {at} " + "and more " * at for at in range(60)))
    found = general_passages(str(path), of, 64)
    assert found is not None and found.source == str(path)
    assert len(found.passages) == MOST_PASSAGES and max(len(passage) for passage in found.passages) == 64
    assert all(passage.targets == len(passage) - 1 for passage in found.passages)
    automatic = general_passages("auto", of, 10_000)
    assert automatic is not None and max(len(passage) for passage in automatic.passages) <= LONGEST
    rows = tmp_path / "general.jsonl"
    rows.write_text('{"content": "Some text"}\n{"title": "None"}\n')
    with pytest.raises(InputError, match="needs a `text` column") as caught:
        general_passages(str(rows), of, 64)
    assert caught.value.where == f"{rows}:2"
    with pytest.raises(InputError, match="no such file"):
        general_passages(str(tmp_path / "nowhere.txt"), of, 64)
