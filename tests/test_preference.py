"""Objectives over preferences: what is read, what is shared, what is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.conftest import WORDS, colour_rows, write_jsonl

from tunesmith.base import InputError
from tunesmith.batch import pack
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.preferences import falling_likelihood
from tunesmith.models.attention import as_transformers_runs_it
from tunesmith.models.load import Loading, load_judge, load_model
from tunesmith.objectives import Dpo, Kto, Orpo, Reward, SimPo, TrainingObjective
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.preference import REFERENCE
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.loaded import compare_with_base
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe import EvaluateSpec, Recipe

PAIRED: dict[str, TrainingObjective] = {
    "dpo": Dpo(),
    "ipo": Dpo(variant="ipo"),
    "hinge": Dpo(variant="hinge"),
    "robust": Dpo(variant="robust", label_smoothing=0.1),
    "cpo": Dpo(variant="cpo"),
    "lengths": Dpo(length_normalized=True, nll_weight=0.5),
    "simpo": SimPo(),
    "orpo": Orpo(),
    "orpo of conversations": Orpo(likelihood="conversation"),
}


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """The better answer is upper-case; the worse one longer and quiet."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"].upper(),
            "rejected": f"{row['completion'].lower()} {WORDS[0]}",
        }
        for row in colour_rows(count, start)
    ]


def labelled(count: int) -> list[dict[str, object]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if at % 2 else "rejected"], "label": bool(at % 2)}
        for at, row in enumerate(pairs(count))
    ]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs(80))


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("labelled") / "rows.jsonl", labelled(80))


def recipe(model: Path, file: Path, output: Path, objective: object, **rest: object) -> Recipe:
    settings: dict[str, object] = {
        "model": str(model),
        "data": {"train": str(file), "validation": 0.1, "checks": False},
        "objective": objective,
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 5e-3, "evaluate_every": 3, "dtype": "fp32"},
        "evaluate": {"rows": 10, "resamples": 50, "forgetting": "off"},
        "output": str(output),
    }
    return Recipe.model_validate({**settings, **rest})


def test_a_pair_is_one_row_whose_prompt_stands_there_once(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    planned = plan_job(recipe(tiny_model, pairs_file, tmp_path / "run", "dpo"))
    assert planned.prepared is not None and planned.tokenizer is not None
    item = planned.prepared.train[0]
    segments = item.example.own_segments().tolist()
    assert [parent for _, _, parent in segments] == [-1, 0, 0]
    prompt, chosen, rejected = (
        planned.tokenizer.decode(item.example.token_ids[start : start + length]) for start, length, _ in segments
    )
    assert item.row.messages[0]["content"] in prompt and item.row.messages[-1]["content"] not in prompt
    assert item.row.references[0] in chosen and chosen.isupper() is False and chosen.strip().endswith("<|im_end|>")
    assert item.row.rejected[-1]["content"] in rejected
    assert planned.plan.metrics == ["reward_accuracy", "preference_accuracy", "margin", "perplexity"]
    positions = item.example.positions()
    assert positions[segments[1][0]] == positions[segments[2][0]] == segments[0][1]


@pytest.mark.parametrize("objective", ["dpo", "simpo", "orpo", {"kind": "dpo", "variant": "ipo"}])
def test_training_on_pairs_prefers_the_better_answer(
    objective: object, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    run = finetune(
        recipe(
            tiny_model,
            pairs_file,
            tmp_path / "run",
            objective,
            train={"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "dtype": "fp32"},
        )
    )
    report = run.report
    assert report is not None
    names = ["reward_accuracy", "preference_accuracy", "margin", "perplexity"]
    if objective in ("simpo", "orpo"):  # without a reference, what is likelier decides
        names[:2] = reversed(names[:2])
    assert [entry["name"] for entry in report["metrics"]] == names
    found = {entry["name"]: entry for entry in report["metrics"]}
    assert found["reward_accuracy"]["base"] == 0.5
    assert found["reward_accuracy"]["tuned"] >= (0.9 if objective != "orpo" else 0.6)  # which learns the answer too
    assert found["preference_accuracy"]["tuned"] >= 0.9 and found["margin"]["difference"] > 0
    preference = report["preference"]
    assert preference["pairs"] == 10 and preference["reward_accuracy"] > 0.5 and preference["reward_margin"] > 0
    rise = [after - before for before, after in (preference["chosen_logps"], preference["rejected_logps"])]
    assert rise[0] - rise[1] == pytest.approx(preference["reward_margin"], rel=1e-6)
    assert preference["sentence"] in (run.path / "report.html").read_text()
    (again,) = compare_with_base(str(run.path), [DataSpec(train=str(pairs_file))], EvaluateSpec(rows=10))
    assert [entry["name"] for entry in again["metrics"]] == ["preference_accuracy", "margin", "perplexity"]
    assert again["metrics"][1]["difference"] > 0


def test_a_falling_likelihood_of_better_answers_is_said_aloud() -> None:
    entry = {"name": "perplexity", "base": 4.0, "tuned": 9.0, "low": 1.0, "high": 8.0}
    assert "from 4.00 to 9.00" in (falling_likelihood([entry]) or "")
    assert falling_likelihood([{**entry, "low": -1.0}]) is None


def test_kto_learns_from_single_answers(tiny_model: Path, labelled_file: Path, tmp_path: Path) -> None:
    run = finetune(
        recipe(
            tiny_model,
            labelled_file,
            tmp_path / "run",
            "kto",
            train={"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "dtype": "fp32"},
        )
    )
    report = run.report
    assert report is not None
    assert report["metrics"][0]["name"] == "margin" and report["metrics"][0]["low"] > 0


def examples_with_reference(model_path: Path, file: Path, tmp_path: Path, objective: object) -> tuple[list, object]:
    planned = plan_job(recipe(model_path, file, tmp_path / "run", objective))
    assert planned.prepared is not None
    model = load_model(str(model_path), dtype=torch.float32, device=torch.device("cpu")).eval()
    found = []
    for at in range(6):
        example = planned.prepared.train[at].example
        with torch.no_grad():
            logps = token_logps(model, pack([example])).logps
        noise = torch.randn(len(logps), generator=torch.Generator().manual_seed(at))
        tensors = {**example.tensors, REFERENCE: logps + 0.3 * noise}
        found.append(
            type(example)(
                example.token_ids, tensors, {**example.scopes, REFERENCE: "target"}, example.source, example.segments
            )
        )
    return found, model


def step_of(objective: TrainingObjective, model: object, examples: list, layout: str, split: int) -> tuple[float, dict]:
    window = [pack(examples[at : at + split], layout) for at in range(0, len(examples), split)]
    window = objective.prepare(model, window)
    totals = {name: sum(float(objective.weights(batch)[name]) for batch in window) for name in objective.terms}
    model.zero_grad()
    loss = 0.0
    for batch in window:
        sums = objective.loss(model, batch)
        part = sum(sums[name] / max(totals[name], 1e-12) for name in sums)
        part.backward()
        loss += float(part.detach())
    return loss, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", PAIRED)
def test_sharing_the_prompt_and_splitting_the_batch_change_nothing(
    name: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    objective = PAIRED[name]
    examples, model = examples_with_reference(tiny_model, pairs_file, tmp_path, "dpo")
    loss, gradient = step_of(objective, model, examples, "packed", 6)
    for layout, split in (("packed", 4), ("packed", 1), ("padded", 6), ("padded", 4)):
        other, same = step_of(objective, model, examples, layout, split)
        assert other == pytest.approx(loss, rel=1e-5), (layout, split)
        for weight, expected in gradient.items():
            torch.testing.assert_close(same[weight], expected, rtol=1e-3, atol=1e-6)


def test_ktos_baseline_does_not_depend_on_the_split(tiny_model: Path, labelled_file: Path, tmp_path: Path) -> None:
    examples, model = examples_with_reference(tiny_model, labelled_file, tmp_path, "kto")
    for example in examples:  # a baseline of zero would hide what is measured
        example.tensors[REFERENCE] -= 0.5
    loss, gradient = step_of(Kto(), model, examples, "packed", 6)
    for layout, split in (("packed", 2), ("padded", 6), ("padded", 1)):
        other, same = step_of(Kto(), model, examples, layout, split)
        assert other == pytest.approx(loss, rel=1e-5), (layout, split)
        for weight, expected in gradient.items():
            torch.testing.assert_close(same[weight], expected, rtol=1e-3, atol=1e-6)


def test_pairs_from_ratings_and_pairs_without_a_difference(tiny_model: Path, tmp_path: Path) -> None:
    rated = [
        {"prompt": row["prompt"], "responses": [row["rejected"], "no", row["chosen"]], "ratings": [2, 1, 5.0]}
        for row in pairs(30)
    ]
    rated += [{"prompt": "Equal?", "responses": ["yes", "no"], "ratings": [3, 3]}]
    planned = plan_job(recipe(tiny_model, write_jsonl(tmp_path / "rated.jsonl", rated), tmp_path / "run", "dpo"))
    assert planned.prepared is not None
    rows = [item.row for item in planned.prepared.train]
    assert all(row.references[0].isupper() and row.rejected[-1]["content"] == "no" for row in rows)
    lost = {lost.reason: lost.rows for lost in planned.prepared.lost}
    held = [note for note in planned.prepared.notes if "rated the same" in note]
    assert lost.get("both answers are the same, or were rated the same", 0) + len(held) == 1


@pytest.mark.parametrize(
    ("objective", "rows", "said"),
    [
        ("sft", pairs(20), "objective.kind: dpo"),
        ("sft", labelled(20), "objective.kind: kto"),
        ("kto", pairs(20), "which this objective does not use"),
        ("dpo", colour_rows(20), "which this objective does not use"),
        ("dpo", [{"prompt": "Hm", "chosen": "a", "rejected": ""}] * 3, "the answer is empty"),
        ("dpo", [{"prompt": "Hm", "responses": ["a"], "ratings": [1]}] * 3, "two or more need one each"),
        (
            "kto",
            [{"prompt": "Hm", "completion": "a", "label": True}, {"prompt": "H", "completion": "a", "label": 1}],
            "'label' must be true",
        ),
    ],
)
def test_rows_that_do_not_fit_are_told(objective: str, rows: list, said: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        plan_job(recipe(tiny_model, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run", objective))


def test_settings_that_say_nothing_are_refused() -> None:
    for settings in ({"variant": "ipo", "label_smoothing": 0.1}, {"variant": "ipo", "length_normalized": True}):
        with pytest.raises(ValueError, match="ipo"):
            Dpo(**settings)


def test_an_answer_that_is_too_long_is_cut_and_the_prompt_never(tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs(20)
    rows[0]["rejected"] = "red " * 60
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(file), "checks": False, "max_length": 60, "overlong": "truncate", "test": 0.2}
    planned = plan_job(recipe(tiny_model, file, tmp_path / "run", "dpo", data=data))
    assert planned.prepared is not None
    assert all(item.example.reach <= 60 for item in planned.prepared.train)
    assert json.dumps(planned.prepared.manifest())


def test_a_reward_model_tells_better_answers_and_is_saved_as_one_number(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    objective = {"kind": "reward", "centering": 0.01}
    settings = {"steps": 30, "batch_size": 8, "learning_rate": 5e-3, "dtype": "fp32"}
    run = finetune(recipe(tiny_model, pairs_file, tmp_path / "run", objective, train=settings))
    report = run.report
    assert report is not None
    accuracy, margin, calibration, *_ = report["metrics"]
    assert accuracy["base"] == 0.5 and accuracy["low"] > 0 and accuracy["tuned"] > 0.8
    assert margin["base"] == 0 and margin["tuned"] > 0
    assert calibration["name"] == "calibration_error"
    head = json.loads((run.path / "adapter" / "head_config.json").read_text())
    (again,) = compare_with_base(str(run.path), [DataSpec(train=str(pairs_file))], EvaluateSpec(rows=10))
    assert again["metrics"][0]["name"] == "preference_accuracy" and again["metrics"][0]["value"] > 0.8
    assert head["labels"] == ["reward"] and head["problem"] == "regression" and head["asks"] == "conversation"


def test_a_reward_reads_the_end_of_each_answer_like_a_row_by_itself(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    planned = plan_job(recipe(tiny_model, pairs_file, tmp_path / "run", "reward"))
    assert planned.prepared is not None and planned.judges is not None
    how = Loading(torch.float32, torch.device("cpu"))
    model, _, new, *_ = load_judge(str(tiny_model), planned.judges.task_head(), how)
    assert new
    model.eval()
    items = [planned.prepared.train[at] for at in range(4)]
    shared = planned.judges.outputs(model, pack([item.example for item in items]))
    padded = planned.judges.outputs(model, pack([item.example for item in items], "padded"))
    torch.testing.assert_close(shared, padded, rtol=1e-4, atol=1e-6)
    for at, item in enumerate(items):
        whole = item.example.token_ids[: int(item.example.own_segments()[2, 0])]
        with as_transformers_runs_it(model):
            expected = model(input_ids=whole[None]).logits[0]
        torch.testing.assert_close(shared[2 * at], expected, rtol=1e-4, atol=1e-6)


def test_rewards_loss_is_that_of_its_definition() -> None:
    outputs = torch.tensor([[1.5], [0.2], [-1.0], [0.5]])
    found = Reward(margin=0.3, centering=0.1).losses(outputs, torch.zeros(4))
    expected = [math.log(1 + math.exp(-(b - w - 0.3))) + 0.1 * (b + w) ** 2 for b, w in ((1.5, 0.2), (-1.0, 0.5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


class Stopped(Exception):
    """What ends a run in the middle of it."""


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "reward"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    kind: str, method: str, tiny_model: Path, pairs_file: Path, labelled_file: Path, tmp_path: Path
) -> None:
    file = labelled_file if kind == "kto" else pairs_file
    train = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "dtype": "fp32"}
    more: dict[str, object] = {"method": method, "train": train, "evaluate": "off"}
    whole = finetune(recipe(tiny_model, file, tmp_path / "whole", kind, **more))

    def stop(event: dict[str, object]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            raise Stopped

    halved = recipe(tiny_model, file, tmp_path / "half", kind, **more)
    with pytest.raises(Stopped):
        finetune(halved, watcher=Watcher(event=stop))
    again = finetune(halved, resume=True)
    for path in whole.path.glob("*/*model.safetensors"):
        assert (again.path / path.relative_to(whole.path)).read_bytes() == path.read_bytes()
