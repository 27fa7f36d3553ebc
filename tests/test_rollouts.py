"""Answers as a source of batches, and whole jobs of policies on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from command_line import python
from conftest import build_model, colour_rows, write_jsonl
from tunesmith.base import InputError, Interrupted, TrainingError
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run
from tunesmith.train.rollout_health import PATIENCE, RolloutHealth, Seen

LOOK_FOR_E = "def score(prompt, answer, references):\n    return answer.count('e') / max(1, len(answer))\n"


METHODS: dict[str, Any] = {"lora": {"dropout": 0.1}, "full": {"kind": "full"}}


@pytest.fixture(scope="module")
def places(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("policies")
    (root / "mine.py").write_text(LOOK_FOR_E)
    (root / "same.py").write_text("def score(prompt, answer, references):\n    return 1\n")
    rows = colour_rows(24)
    return {
        "model": str(tiny_model),
        "prompts": str(write_jsonl(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])),
        "rows": str(write_jsonl(root / "rows.jsonl", rows)),
        "function": str(root / "mine.py") + ":score",
        "constant": str(root / "same.py") + ":score",
    }


def values(places: dict[str, str], output: Path, kind: str = "grpo", **sections: Any) -> dict[str, Any]:
    reward = {"kind": "function", "path": places["function"]}
    found: dict[str, Any] = {
        "model": places["model"],
        "data": {"train": places["prompts"], "test": 0.2},
        "method": {"kind": "lora", "rank": 4},
        "objective": {"kind": kind, "max_new_tokens": 6, "group_size": 4, "reward": reward},
        "train": {"steps": 4, "batch_size": 3, "learning_rate": 0.05, "dtype": "fp32", "warmup": 1},
        "evaluate": {"forgetting": "off", "samples": 1, "resamples": 20},
        "output": str(output),
    }
    for name, section in sections.items():
        whole = not isinstance(section, dict) or (name == "method" and "kind" in section)
        found[name] = section if whole else {**found.get(name, {}), **section}
    return found


def done(places: dict[str, str], output: Path, kind: str = "grpo", **sections: Any) -> Run:
    return finetune(check_recipe(values(places, output, kind, **sections), "test"))


def rollouts(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == "rollout"]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_the_reward_rises(kind: str, places: dict[str, str], tmp_path: Path) -> None:
    run = done(
        places,
        tmp_path / "run",
        kind,
        data={"test": 0.4},
        method={"kind": "full"},
        objective={"kl": 0.002, "group_size": 8, "passes": 1, "max_new_tokens": 8},
        train={"steps": 20, "batch_size": 4, "learning_rate": 0.01},
    )
    seen = rollouts(run)
    rewards = [event["reward"] for event in seen]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    assert [event["step"] for event in seen] == list(range(1, 21))
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-5) and seen[-1]["kl"] > 0.5
    assert run.report is not None
    [metric] = run.report["metrics"]
    assert metric["name"] == "reward" and metric["low"] > 0 and run.report["verdict"] == "ship"
    assert (run.path / "value_head").is_dir() == (kind == "ppo")
    names = load_file(next(run.path.glob("model/*.safetensors"))).keys()
    assert not any("value_head" in name for name in names)
    assert any("is kept beside the trained one" in note for note in run.report["warnings"])


@pytest.mark.parametrize(("kind", "method"), [("grpo", "lora"), ("rloo", "full"), ("ppo", "lora"), ("ppo", "full")])
def test_a_killed_run_resumes_to_the_same_bytes(kind: str, method: str, places: dict[str, str], tmp_path: Path) -> None:
    """Killed by SIGKILL between two steps that share their answers, after a checkpoint in the middle of such a pair."""
    given = values(
        places,
        tmp_path / "whole",
        kind,
        method=METHODS[method],
        objective={"passes": 2, **({"kl_target": 0.1} if kind == "ppo" else {})},
        train={"steps": 8, "checkpoint_every": 3, "learning_rate": 0.01},
        evaluate="off",
    )
    whole = finetune(check_recipe(given, "test"))
    given["output"] = str(tmp_path / "killed")
    (tmp_path / "recipe.json").write_text(json.dumps(given))
    script = (
        "import json, os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tunesmith.pipeline.finetune import Watcher, finetune\n"
        "from tunesmith.recipe_file import check_recipe\n"
        "def kill(event):\n"
        "    if event.get('event') == 'step' and event['step'] == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "finetune(check_recipe(json.load(open(sys.argv[1])), 'test'), watcher=Watcher(event=kill))\n"
    )
    died = python(script, tmp_path / "recipe.json")
    assert died.returncode == -signal.SIGKILL, died.stderr
    resumed = finetune(check_recipe(given, "test"), resume=True)
    for name in ("optimizer", "trained", "beside"):
        path = f"checkpoints/step-8/{name}.safetensors"
        assert (resumed.path / path).read_bytes() == (whole.path / path).read_bytes(), name
    told = [[{**event, "seconds": 0, "report": ""} for event in run.events()] for run in (resumed, whole)]
    assert told[0] == told[1]


def test_answers_do_not_depend_on_how_many_are_drawn_or_trained_at_a_time(
    places: dict[str, str], tmp_path: Path
) -> None:
    train = {"steps": 2, "learning_rate": 1e-4}
    runs = [
        done(places, tmp_path / f"{at}-{size}", train={**train, "micro_batch": at}, objective={"sample_batch": size})
        for at, size in ((3, 32), (1, 5))
    ]
    one, other = (rollouts(run) for run in runs)
    assert [event["best"] for event in one] == [event["best"] for event in other]
    assert one[1]["kl"] == pytest.approx(other[1]["kl"], abs=1e-4)


def test_a_stop_while_answers_are_drawn_leaves_no_trace(places: dict[str, str], tmp_path: Path) -> None:
    """Asked to end in the third step; resumed, all is as if nothing had happened."""
    given = values(places, tmp_path / "whole", evaluate="off")
    whole = finetune(check_recipe(given, "test"))
    given["output"] = str(tmp_path / "stopped")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finetune(check_recipe(given, "test"), watcher=Watcher(event=stop))
    resumed = finetune(check_recipe(given, "test"), resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert [event["best"] for event in rollouts(resumed)] == [event["best"] for event in rollouts(whole)]


def test_a_reward_that_is_constant_is_said_and_ends_the_run(places: dict[str, str], tmp_path: Path) -> None:
    reward = {"kind": "function", "path": places["constant"]}
    with pytest.raises(TrainingError, match=r"the reward was constant: .* \(on average 1\) in all 6 rollouts"):
        done(places, tmp_path / "run", objective={"reward": reward}, train={"steps": 6})
    [said] = [event for event in Run(tmp_path / "run").events() if event["event"] == "warning"]
    assert "has been constant (1)" in said["message"] and said["step"] == PATIENCE


def test_the_reward_chooses_the_best_checkpoint(places: dict[str, str], tmp_path: Path) -> None:
    run = done(places, tmp_path / "run", data={"validation": 0.2}, train={"evaluate_every": 2})
    told = [event for event in run.events() if event["event"] in ("validation", "answers")]
    assert [event["event"] for event in told] == ["validation", "answers"] * 2
    assert told[0]["loss"] == pytest.approx(-told[1]["metrics"]["reward"])


def test_reference_answers_reach_the_reward(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="constant"):  # a random model never says it, and is told so
        done(places, tmp_path / "run", data={"train": places["rows"]}, objective={"reward": "exact"})
    seen = rollouts(Run(tmp_path / "run"))
    assert [event["reward"] for event in seen] == [0.0] * 4


def test_other_metrics_stand_beside_the_reward(places: dict[str, str], tmp_path: Path) -> None:
    run = done(places, tmp_path / "run", data={"train": places["rows"]}, evaluate={"metrics": ["chrf"]})
    assert run.report is not None
    assert [metric["name"] for metric in run.report["metrics"]] == ["chrf", "reward"]


def test_the_hash_of_a_function_is_in_the_plan(places: dict[str, str], tmp_path: Path) -> None:
    plan = plan_job(check_recipe(values(places, tmp_path / "run"), "test")).plan
    found = {item.name: item.value for item in plan.resolved}
    assert len(found[places["function"]]) == 64
    assert found["evaluate.metrics"] == ["reward"] and found["evaluate.max_new_tokens"] == 6
    assert plan.workload.longest >= 4 * 6


def test_a_padded_model_learns_from_its_answers_too(places: dict[str, str], tmp_path: Path) -> None:
    given = {**places, "model": str(build_model(tmp_path / "gpt2", "gpt2"))}
    run = done(given, tmp_path / "run", "ppo", train={"packing": False}, method={"kind": "lora", "rank": 2})
    assert len(rollouts(run)) == 1  # four passes


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "train_on": ({"data": {"train_on": "everything"}}, "about given answers"),
    "head": ({"method": {"kind": "head"}}, "drawn anew at every step"),
    "memory": ({"budget": {"memory": "900MB"}}, "each token of an answer would read the whole model"),
    "shard": ({"train": {"shard": True}}, "answers cannot be drawn from weights that are spread"),
    "near": ({"train": {"kl_to_base": 0.1}}, "objective.kl holds a policy near its base"),
    "positions": ({"objective": {"max_new_tokens": 250}}, "250 more do not fit into the model's 256 positions"),
    "reference": ({"objective": {"reward": "exact"}}, "no reference answer, with which the reward exact compares"),
    "perplexity": ({"evaluate": {"metrics": ["perplexity"]}}, "gives its own answers is judged by them"),
    "metric": ({"evaluate": {"metrics": ["rewardd"]}}, "unknown metric 'rewardd'"),
    "chrf": ({"evaluate": {"metrics": ["chrf"]}}, "chrf compares with reference answers"),
    "gate": ({"gate": {"nothing": 1}}, "unknown metric 'nothing'"),
    "texts": ({"data": {"format": "text", "columns": {"text": "prompt"}}}, "'text', which this objective does not use"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_drawing_answers_is_refused(name: str, places: dict[str, str], tmp_path: Path) -> None:
    sections, what = REFUSED[name]
    given = values(places, tmp_path / "run", **sections)
    with pytest.raises(InputError) as told:
        plan_job(check_recipe(given, "test"))
    assert what in str(told.value)


def test_notes_say_what_a_job_costs_and_does_not_measure(places: dict[str, str], tmp_path: Path) -> None:
    recipe = values(places, tmp_path / "run", objective={"kl": 0}, method={"dropout": 0.1})
    notes = " ".join(plan_job(check_recipe(recipe, "test")).plan.notes)
    assert "objective.kl is 0" in notes and "without dropout" in notes and "on top of it" in notes


def test_prompts_alone_are_refused_elsewhere(places: dict[str, str], tmp_path: Path) -> None:
    given = values(places, tmp_path / "run")
    given["objective"] = "sft"
    with pytest.raises(InputError, match="no known format has the columns prompt") as told:
        plan_job(check_recipe(given, "test"))
    assert "data.columns" in str(told.value)


def test_prompts_may_be_turns_and_some_may_have_references(places: dict[str, str], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows: list[dict[str, Any]] = [{"prompt": [*turns, {"role": "user", "content": f"Say {at}"}]} for at in range(8)]
    rows += [{"prompt": f"Count {at}", "completion": str(at)} for at in range(8)]
    given = values(places, tmp_path / "run", data={"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))})
    prepared = plan_job(check_recipe(given, "test")).prepared
    assert prepared is not None and prepared.sources[0]["format"] == "prompts"
    everything = [*prepared.train, *prepared.test]
    said = sorted(item.row.references[0] for item in everything)
    assert said == sorted([""] * 8 + [str(at) for at in range(8)])
    assert all(item.example.token_ids.tolist() == list(item.prompt_ids) for item in everything)
    bad = values(places, tmp_path / "run")
    bad["data"]["train"] = str(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": turns}]))
    with pytest.raises(InputError, match="assistant speaks after"):
        plan_job(check_recipe(bad, "test"))


def seen(**changes: Any) -> Seen:
    usual = {
        "reward": 0.5, "reward_std": 0.1, "kl": 0.1, "kl_of_token": 0.01, "entropy": 1.0, "length": 9.0, "cut": 0.0,
        "flat": 0.0, "alike": 0.0,
    }  # fmt: skip
    return Seen(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flat": 1.0}, "reward has been constant"),
        ({"alike": 1.0}, "answers to each prompt have all been alike"),
        ({"entropy": 0.001}, "its entropy has been below"),
        ({"kl_of_token": 2.0}, "has left the model it started from"),
    ],
)
def test_a_policy_that_falls_apart_is_said_once_while_it_lasts(changes: dict[str, Any], said: str) -> None:
    health = RolloutHealth()
    assert health.observe(seen(), last=False) == []
    for _ in range(PATIENCE - 1):
        assert health.observe(seen(**changes), last=False) == []
    health = RolloutHealth.of(health.tensor())  # a checkpoint in between
    [told] = health.observe(seen(**changes), last=False)
    assert said in told
    assert health.observe(seen(**changes), last=False) == []
    assert health.observe(seen(), last=True) == []
    for _ in range(PATIENCE - 1):
        health.observe(seen(**changes), last=False)
    assert said in health.observe(seen(**changes), last=False)[0]
