"""What decides: which metric, what a comparison comes to, and that likelihoods and answers are the model's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import colour_rows
from tunesmith.base import InputError
from tunesmith.batch import Example, Source
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.engine.generate import Sampling, generate
from tunesmith.evaluation.answers import Judged, Judging, judge, mean_nll, prompt_text, row_nlls
from tunesmith.evaluation.compare import (
    best_and_worst,
    choose_metrics,
    compare_forgetting,
    compare_metrics,
    gain,
    judgement,
    metric_rows,
)
from tunesmith.evaluation.forgetting import LONGEST, MOST_PASSAGES, general_passages
from tunesmith.models.templates import resolve_template
from tunesmith.recipe import EvaluateSpec

SPEC = EvaluateSpec(resamples=200)
INTENTS = [f"intent_{at}" for at in range(77)]


def quiet(*_: object) -> None:
    pass


# --- which metric ---

ANSWERS: dict[str, tuple[list[str], list[str]]] = {
    "two labels": (["yes", "no", "No", "Yes "] * 5, ["accuracy"]),
    "two rows of labels": (["positive", "negative"], ["accuracy"]),
    "77 intents": ([INTENTS[at * 7 % 77] for at in range(200)], ["accuracy"]),
    "short answers": ([f"city {at}" for at in range(40)], ["exact_match", "f1"]),
    "SQL": (
        [f"SELECT name FROM t{at} WHERE Current slogan = 'SOUTH' AND age = {at}" for at in range(20)],
        ["exact_match", "rougeL", "f1"],
    ),
    "JSON": (
        [f'{{"name": "Ada", "age": {at}, "tags": ["a", "b"]}}' for at in range(20)],
        ["exact_match", "rougeL", "f1"],
    ),
    "sentences": (
        [f"We propose a new method for number {at} that works better than the old one." for at in range(20)],
        ["rougeL", "rouge1", "rouge2", "chrf"],
    ),
    "prose": (["A long text about things. " * 20] * 10, ["rougeL", "rouge1", "rouge2", "chrf"]),
    "code in prose": (
        ["Use the `sorted` function, which returns a list; it's stable."] * 9,
        ["rougeL", "rouge1", "rouge2", "chrf"],
    ),
    "raw text": ([], []),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_metrics_are_chosen_from_the_answers(case: str) -> None:
    references, expected = ANSWERS[case]
    names, why = choose_metrics("auto", references)
    assert names == [*expected, "perplexity"] and why


def test_metrics_are_taken_from_the_recipe() -> None:
    assert choose_metrics(["bleu", "f1", "bleu"], ["x"])[0] == ["bleu", "f1", "perplexity"]
    assert choose_metrics(["perplexity", "f1"], ["x"])[0] == ["perplexity", "f1"]
    with pytest.raises(InputError, match="unknown metric 'rogueL'; did you mean 'rougeL'") as caught:
        choose_metrics(["rogueL"], ["x"])
    assert caught.value.where == "evaluate.metrics" and "perplexity" in (caught.value.fix or "")


# --- base against tuned ---


def judged(
    answers: list[str | None], *, nlls: list[float | None] | None = None, reference: str = "right"
) -> list[Judged]:
    nlls = nlls or [2.0] * len(answers)
    return [
        Judged(f"rows:{at}", f"prompt {at}", [reference], answer, "stop" if answer else None, nll, 2)
        for at, (answer, nll) in enumerate(zip(answers, nlls, strict=True), start=1)
    ]


def test_metrics_are_compared_with_paired_intervals() -> None:
    base, tuned = judged(["wrong"] * 12 + ["right"] * 8), judged(["right"] * 18 + ["wrong"] * 2, nlls=[1.0] * 20)
    entries, warnings = compare_metrics(["exact_match", "perplexity"], base, tuned, SPEC, seed=0)
    match, perplexity = entries
    assert not warnings
    assert (match["base"], match["tuned"], match["n"], match["better"]) == (0.4, 0.9, 20, "higher")
    assert match["difference"] == pytest.approx(0.5) and 0 < match["low"] < 0.5 < match["high"]
    assert perplexity["base"] == pytest.approx(math.e) and perplexity["tuned"] == pytest.approx(math.exp(0.5))
    assert perplexity["better"] == "lower" and perplexity["high"] < 0
    assert [entry["primary"] for entry in entries] == [True, False]
    assert gain(perplexity)[0] > 0 and (gain(perplexity)[1] or 0) > 0


def test_a_tuned_model_without_likelihoods_is_not_measured_on_the_rest() -> None:
    base = judged(["right"] * 6)
    tuned = judged(["right"] * 6, nlls=[None, None, 0.1, 0.1, 0.1, 0.1])
    entries, warnings = compare_metrics(["perplexity", "exact_match"], base, tuned, SPEC, seed=0)
    assert [entry["name"] for entry in entries] == ["exact_match"] and entries[0]["primary"] is False
    assert warnings == ["perplexity could not be computed: the tuned model's likelihood of 2 rows is not finite"]
    decided = judgement(entries, {"status": "off"}, {})
    assert decided.verdict == "no_difference" and "the deciding metric could not be measured" in decided.sentence
    assert judgement(entries, {"status": "off"}, {"perplexity": 0.0}).verdict == "dont_ship"


def test_rows_on_which_only_the_base_fails_are_left_out_and_told() -> None:
    base = judged(["right"] * 6, nlls=[None, 0.0, 2.0, 2.0, 2.0, 2.0])
    entries, warnings = compare_metrics(["perplexity"], base, judged(["right"] * 6), SPEC, seed=0)
    assert entries[0]["n"] == 5
    assert warnings == ["perplexity leaves out 1 of 6 rows: the base's likelihood is not finite"]


def test_a_metric_without_answers_is_a_warning() -> None:
    base = judged([None] * 4)
    entries, warnings = compare_metrics(["rougeL", "perplexity"], base, base, SPEC, seed=0)
    assert [entry["name"] for entry in entries] == ["perplexity"]
    assert warnings == ["rougeL could not be computed: no row has what it needs"]
    assert metric_rows("perplexity", judged(["a"], nlls=[None])) is None


# --- the verdict ---


def entry(difference: float, low: float | None, high: float | None, *, name: str = "rougeL") -> dict[str, Any]:
    better = "lower" if name == "perplexity" else "higher"
    values = {"base": 0.3, "tuned": 0.3 + difference, "difference": difference, "low": low, "high": high}
    return {"name": name, **values, "better": better, "n": 50, "primary": True}


OFF = {"status": "off", "reason": "evaluate.forgetting is off"}
FORGOT = {"status": "measured", "source": "x", "base": 10.0, "tuned": 10.4, "change": 0.04, "low": 0.03, "high": 0.05}
FAILED = {"status": "could_not_run", "source": "x", "reason": "the likelihood of the text is not finite"}


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [
        (entry(0.1, 0.05, 0.15), "ship"),
        (entry(0.1, -0.01, 0.2), "no_difference"),
        (entry(0.1, 0.0, 0.2), "no_difference"),
        (entry(-0.1, -0.2, -0.05), "dont_ship"),
        (entry(0.1, None, None), "no_difference"),
        (entry(-3.0, -4.0, -2.0, name="perplexity"), "ship"),
        (entry(3.0, 2.0, 4.0, name="perplexity"), "dont_ship"),
        (entry(-3.0, -6.0, 0.5, name="perplexity"), "no_difference"),
    ],
)
def test_without_a_gate_the_interval_decides(metric: dict[str, Any], verdict: str) -> None:
    decided = judgement([metric], OFF, {})
    assert decided.verdict == verdict and decided.gate == []
    opening = {"ship": "Ship it: ", "dont_ship": "Don't ship it: ", "no_difference": "No difference shown: "}[verdict]
    assert decided.sentence.startswith(f"{opening}{metric['name']} went from 0.300 to ")


GATES: list[tuple[dict[str, float], dict[str, Any], dict[str, Any], bool | None]] = [
    ({"rougeL": 0.05}, entry(0.1, 0.02, 0.2), OFF, True),
    ({"rougeL": 0.1}, entry(0.1, 0.02, 0.2), OFF, True),
    ({"rougeL": 0.2}, entry(0.1, 0.02, 0.2), OFF, False),
    ({"rougeL": 0.05}, entry(0.1, -0.02, 0.2), OFF, False),  # large enough, but not distinguishable from zero
    ({"rougeL": 0.05}, entry(0.1, None, None), OFF, False),
    ({"rougeL": -0.02}, entry(-0.01, -0.05, 0.03), OFF, True),  # may lose a little
    ({"rougeL": -0.02}, entry(-0.03, -0.05, -0.01), OFF, False),
    ({"rougeL": 0.0}, entry(0.0, -0.1, 0.1), OFF, True),
    ({"perplexity": 1.0}, entry(-2.0, -3.0, -1.0, name="perplexity"), OFF, True),
    ({"perplexity": 1.0}, entry(2.0, 1.0, 3.0, name="perplexity"), OFF, False),
    ({"forgetting": 0.05}, entry(0.1, 0.02, 0.2), FORGOT, True),
    ({"forgetting": 0.03}, entry(0.1, 0.02, 0.2), FORGOT, False),
    ({"forgetting": 0.05}, entry(0.1, 0.02, 0.2), FAILED, None),
    ({"forgetting": 0.05}, entry(0.1, 0.02, 0.2), OFF, None),
    ({"forgetting": 0.05}, entry(0.1, 0.02, 0.2), {**FORGOT, "change": None}, None),
    ({"bleu": 1.0}, entry(0.1, 0.02, 0.2), OFF, None),
]


@pytest.mark.parametrize(("gate", "metric", "forgetting", "passed"), GATES)
def test_a_gate_passes_only_on_what_was_measured(
    gate: dict[str, float], metric: dict[str, Any], forgetting: dict[str, Any], passed: bool | None
) -> None:
    decided = judgement([metric], forgetting, gate)
    [check] = decided.gate
    assert check["passed"] is passed and check["reason"]
    assert decided.verdict == ("ship" if passed is True else "dont_ship")
    name = next(iter(gate))
    if passed is None:
        assert check["measured"] is None and f"the gate {name} asked for" in decided.sentence
        assert "could not be checked" in decided.sentence
    elif not passed:
        assert f"the gate {name} asked for {gate[name]:+.3g} and measured" in decided.sentence


def test_one_failed_gate_is_enough() -> None:
    gate = {"rougeL": 0.05, "forgetting": 0.01}
    assert judgement([entry(0.1, 0.02, 0.2)], FORGOT, gate).verdict == "dont_ship"
    assert judgement([entry(0.1, 0.02, 0.2)], FORGOT, {**gate, "forgetting": 0.1}).verdict == "ship"
    assert judgement([], OFF, {"rougeL": -1.0}).verdict == "dont_ship"
    assert "nothing was measured" in judgement([], OFF, {}).sentence
    assert "forgetting could not be measured" in judgement([entry(0.1, 0.02, 0.2)], FAILED, {}).sentence
    loud = judgement([entry(0.1, 0.02, 0.2)], {**FORGOT, "change": 0.2}, {}).sentence
    assert "perplexity on general text changed by +20.0%, which is a lot" in loud


def test_forgetting_is_the_relative_rise_of_perplexity() -> None:
    base = {"nlls": [10.0, 30.0, 20.0], "targets": [10, 20, 10]}
    tuned = {"nlls": [value * 1.1 for value in base["nlls"]], "targets": base["targets"]}
    found = compare_forgetting("text", base, tuned, SPEC, seed=0)
    assert found["status"] == "measured" and found["n"] == 3
    assert found["base"] == pytest.approx(math.exp(60 / 40)) and found["tuned"] == pytest.approx(math.exp(66 / 40))
    assert found["change"] == pytest.approx(math.exp(6 / 40) - 1)
    assert found["low"] <= found["change"] <= found["high"]
    assert compare_forgetting(None, None, None, SPEC, seed=0)["status"] == "off"
    for broken in (
        None,
        {},
        {"nlls": [math.nan] * 3, "targets": [1, 1, 1]},
        {"nlls": [math.inf] * 3, "targets": [1] * 3},
    ):
        assert compare_forgetting("text", base, broken, SPEC, seed=0)["status"] == "could_not_run"


def test_best_and_worst_samples() -> None:
    base = judged(["right", "wrong", "wrong", "right"])
    tuned = judged(["wrong", "right", "wrong", "right"])
    shown = best_and_worst("exact_match", base, tuned, 1)
    assert [row["source"] for row in shown["best"]] == ["rows:2"]
    assert [row["source"] for row in shown["worst"]] == ["rows:1"]
    best = shown["best"][0]
    assert (best["base"], best["tuned"], best["score_base"], best["score_tuned"]) == ("wrong", "right", 0.0, 1.0)
    more = best_and_worst("exact_match", base, tuned, 8)
    assert len(more["best"]) == len(more["worst"]) == 2, "no row stands on both sides"
    assert best_and_worst("exact_match", base, tuned, 0) == {"best": [], "worst": []}
    raw = judged([None] * 3, nlls=[4.0, 4.0, 4.0]), judged([None] * 3, nlls=[1.0, 9.0, None])
    by_likelihood = best_and_worst("rougeL", *raw, 4)
    assert [row["source"] for row in by_likelihood["best"]] == ["rows:1"]
    assert [row["source"] for row in by_likelihood["worst"]] == ["rows:2"]
    assert best_and_worst("rougeL", judged([None], nlls=[None]), judged([None], nlls=[None]), 4)["best"] == []


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
