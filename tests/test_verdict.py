"""Which metric decides, what a comparison comes to, and that nothing unmeasured passes a gate."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import (
    best_and_worst,
    choose_metrics,
    compare_forgetting,
    compare_metrics,
    gain,
    judgement,
    metric_rows,
)
from tunesmith.recipe import EvaluateSpec

SPEC = EvaluateSpec(resamples=200)
INTENTS = [f"intent_{at}" for at in range(77)]


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
    ({"forgetting": 0.03}, entry(0.1, 0.02, 0.2), {**FORGOT, "low": 0.01}, False),
    ({"forgetting": 0.03}, entry(0.1, 0.02, 0.2), {**FORGOT, "low": -0.01}, True),  # within the noise of the passages
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
