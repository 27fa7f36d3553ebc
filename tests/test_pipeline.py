"""The whole job on a tiny model: what stands in a run, gates, resuming, dead runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import python
from conftest import build_model, colour_rows, write_jsonl
from tunesmith.base import InputError, TrainingError
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.recipe_file import check_recipe, read_recipe
from tunesmith.run import Run


def recipe_values(tiny: Path, rows: Path, output: Path, /, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": str(tiny),
        "data": {"train": str(rows), "validation": 0.1},
        "method": {"kind": "lora", "rank": 4},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 0.02, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 4, "resamples": 50, "rows": 10, "forgetting": "off"},
        "output": str(output),
    }
    for name, value in sections.items():
        before = values.get(name)
        values[name] = {**before, **value} if isinstance(value, dict) and isinstance(before, dict) else value
    return values


def run_job(tiny: Path, rows: Path, output: Path, /, **sections: Any) -> Run:
    return finetune(check_recipe(recipe_values(tiny, rows, output, **sections), "test"))


@pytest.fixture(scope="module")
def finished(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "first"
    return run_job(tiny_model, rows_file, path, evaluate={"forgetting": "auto"})


def test_a_run_holds_what_other_programs_rely_on(finished: Run) -> None:
    for name in (
        "recipe.yaml",
        "plan.json",
        "data.json",
        "environment.json",
        "events.jsonl",
        "report.json",
        "report.html",
    ):
        assert (finished.path / name).is_file(), name
    steps = [event for event in finished.events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    for event in steps:
        assert {"step", "loss", "tokens", "targets", "seconds", "grad_norm", "learning_rate"} <= event.keys()
        assert 0 < event["targets"] < event["tokens"]
    assert (finished.path / "adapter" / "adapter_config.json").is_file()
    assert (finished.path / "checkpoints" / "step-6").is_dir()
    assert not (finished.path / "run.lock").exists()


def test_the_report_says_what_was_promised(finished: Run) -> None:
    report = finished.report
    assert report is not None
    assert report["verdict"] in ("ship", "dont_ship", "no_difference")
    for entry in report["metrics"]:
        assert entry["difference"] == pytest.approx(entry["tuned"] - entry["base"])
        assert entry["better"] in ("higher", "lower")
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["n"] == 10
    assert {entry["name"] for entry in report["metrics"]} >= {"exact_match", "perplexity"}
    assert report["forgetting"]["status"] == "measured"
    data = report["data"]
    assert data["rows_used"] + data["rows_lost"] + data["test"]["rows"] + data["validation"]["rows"] == 120
    assert data["target_tokens_used"] > 0
    assert report["predicted"]["peak_bytes"] > 0 and report["measured"]["peak_bytes"] > 0
    assert report["measured"]["seconds"] > 0
    page = finished.page.read_text(encoding="utf-8")
    assert report["sentence"] in page.replace("&#39;", "'")


def test_the_recipe_of_a_run_makes_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    again = finetune(read_recipe(finished.path / "recipe.yaml", [f"output={tmp_path / 'again'}"]))
    for name in ("adapter/adapter_model.safetensors",):
        assert (again.path / name).read_bytes() == (finished.path / name).read_bytes()
    assert _numbers(again) == _numbers(finished)


def test_an_occupied_directory_is_refused(finished: Run, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a run already"):
        run_job(tiny_model, rows_file, finished.path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        run_job(tiny_model, rows_file, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_of_a_finished_run_changes_nothing(finished: Run, tiny_model: Path, rows_file: Path) -> None:
    before = (finished.path / "report.json").read_bytes()
    recipe = read_recipe(finished.path / "recipe.yaml")
    finetune(recipe, resume=True)
    assert (finished.path / "report.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_killed_run_resumes_to_the_same_bytes(kind: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL after a checkpoint; the uninterrupted run is the reference."""
    sections: dict[str, Any] = {
        "method": {"kind": "full"} if kind == "full" else {"kind": "lora", "rank": 4, "dropout": 0.1},
        "train": {"steps": 8, "checkpoint_every": 2, "batch_size": 8, "learning_rate": 0.005, "dtype": "fp32"},
        "evaluate": "off",
    }
    values = recipe_values(tiny_model, rows_file, tmp_path / "whole")
    values.update(sections)
    whole = finetune(check_recipe(values, "test"))
    values["output"] = str(tmp_path / "killed")
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    script = (
        "import json, os, signal, sys\n"
        "from tunesmith.pipeline.finetune import Watcher, finetune\n"
        "from tunesmith.recipe_file import check_recipe\n"
        "def kill(event):\n"
        "    if event.get('event') == 'step' and event['step'] == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "finetune(check_recipe(json.load(open(sys.argv[1])), 'test'), watcher=Watcher(event=kill))\n"
    )
    died = python(script, tmp_path / "recipe.json")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "killed" / "run.lock").exists()
    resumed = finetune(check_recipe(values, "test"), resume=True)
    name = "adapter/adapter_model.safetensors" if kind == "lora" else "model/model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    last = "checkpoints/step-8/optimizer.safetensors"
    assert (resumed.path / last).read_bytes() == (whole.path / last).read_bytes()
    assert _numbers(resumed) == _numbers(whole)


def test_resume_refuses_another_recipe_or_other_data(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", colour_rows(60))
    values = recipe_values(tiny_model, rows, tmp_path / "run", train={"steps": 2, "checkpoint_every": 1})
    run = finetune(check_recipe(values, "test"))
    for name in ("report.json", "report.html"):
        (run.path / name).unlink()
    changed = json.loads(json.dumps(values))
    changed["method"]["rank"] = 8
    with pytest.raises(InputError, match=r"method\.rank is 8 now and was 4"):
        finetune(check_recipe(changed, "test"), resume=True)
    write_jsonl(rows, colour_rows(61))
    with pytest.raises(InputError, match="has changed since"):
        finetune(check_recipe(values, "test"), resume=True)
    write_jsonl(rows, colour_rows(60))
    assert finetune(check_recipe(values, "test"), resume=True).report is not None


def test_a_gate_decides(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    easy = run_job(
        tiny_model,
        rows_file,
        tmp_path / "easy",
        gate={"exact_match": -1, "forgetting": "900%"},
        evaluate={"forgetting": "auto"},
    )
    assert easy.report is not None and easy.report["verdict"] == "ship"
    hard = run_job(tiny_model, rows_file, tmp_path / "hard", gate={"rougeL": "+0.99"})
    assert hard.report is not None and hard.report["verdict"] == "dont_ship"
    assert hard.report["gate"][0]["passed"] is False
    assert any(entry["name"] == "rougeL" for entry in hard.report["metrics"])


def test_a_diverging_run_is_told_and_keeps_its_last_good_checkpoint(
    tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"diverged|finite|collapsed"):
        run_job(
            tiny_model,
            rows_file,
            tmp_path / "wild",
            train={"steps": 60, "learning_rate": 500.0, "warmup": 0, "checkpoint_every": 1, "clip": "off"},
        )
    run = Run.open(tmp_path / "wild")
    assert run.events()[-1]["event"] == "failed"
    assert run.report is None and run.result is None
    assert list(run.checkpoints.iterdir())
    assert run.summary()["state"] == "failed"


def test_learning_rate_too_small_to_move_anything_is_told(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the adapter is dead"):
        run_job(tiny_model, rows_file, tmp_path / "slow", train={"steps": 1, "learning_rate": 1e-30})


def test_full_training_learns_the_task(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    values = recipe_values(tiny_model, rows_file, tmp_path / "full")
    values["method"] = {"kind": "full"}
    values["train"] = {"steps": 120, "batch_size": 16, "learning_rate": 0.01, "dtype": "fp32"}
    run = finetune(check_recipe(values, "test"))
    losses = [event["loss"] for event in run.events() if event["event"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    report = run.report
    assert report is not None
    perplexity = next(entry for entry in report["metrics"] if entry["name"] == "perplexity")
    assert perplexity["high"] < 0
    assert (run.path / "model" / "model.safetensors").is_file()


def test_early_stopping_keeps_the_best_weights(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    run = run_job(
        tiny_model,
        rows_file,
        tmp_path / "early",
        train={
            "steps": 60,
            "learning_rate": 0.3,
            "evaluate_every": 2,
            "early_stopping": {"patience": 2},
            "schedule": "constant",
        },
    )
    trained = next(event for event in run.events() if event["event"] == "trained")
    validation = {e["step"]: e["loss"] for e in run.events() if e["event"] == "validation"}
    assert trained["stopped_early"] and trained["step"] < 60
    assert min(validation, key=lambda step: validation[step]) == trained["best_step"]
    best = load_file(run.checkpoints / f"step-{trained['best_step']}" / "trained.safetensors")
    final = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_models_that_cannot_pack_are_padded_and_it_is_said(rows_file: Path, tmp_path: Path) -> None:
    model = build_model(tmp_path / "bloom", "bloom", n_head=4, n_layer=2)
    run = run_job(model, rows_file, tmp_path / "run", method={"targets": "all-linear"})
    plan = run.read("plan.json")
    assert plan["packing"] is False
    assert any(item["name"] == "train.packing" and item["value"] is False for item in plan["resolved"])
    assert run.report is not None and any("padded" in text for text in run.report["warnings"])
    with pytest.raises(InputError, match="cannot be packed"):
        run_job(model, rows_file, tmp_path / "forced", train={"packing": True})
    assert not (tmp_path / "forced").exists()


def test_bad_input_leaves_nothing_behind(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"model": str(tmp_path / "nowhere")},
        {"data": {"train": str(tmp_path / "nothing.jsonl")}},
        {"method": {"kind": "lora", "targets": "q_prj"}},
        {"data": {"max_length": 5}},
        {"evaluate": {"metrics": ["rogueL"]}},
        {"gate": {"rogueL": 0.1}},
        {"data": {"template": "chatlm"}},
        {"evaluate": {"forgetting": str(tmp_path / "general.txt")}},
        {"train": {"dtype": "fp16"}},
    ]
    for number, sections in enumerate(cases):
        output = tmp_path / f"run-{number}"
        with pytest.raises(InputError):
            run_job(tiny_model, rows_file, output, **sections)
        assert not output.exists(), sections


def test_sigterm_commits_and_resumes(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    values = recipe_values(tiny_model, rows_file, tmp_path / "run", train={"steps": 4000, "checkpoint_every": "off"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", str(tmp_path / "recipe.yaml"), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= 3:
            process.send_signal(signal.SIGTERM)
            break
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert time.monotonic() - started < 30
    run = Run.open(tmp_path / "run")
    assert run.events()[-1]["event"] == "interrupted"
    assert list(run.checkpoints.iterdir()) and not (run.path / "run.lock").exists()


def test_a_recipe_made_in_python_gets_a_directory_with_a_real_name(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_job(tiny_model, rows_file, Path("runs/{name}"))
    assert run.path == Path("runs/run") and not (tmp_path / "runs" / "{name}").exists()


def test_two_runs_cannot_share_a_directory(finished: Run) -> None:
    with finished.locked(), pytest.raises(InputError, match="is working in this run"), finished.locked():
        pass


def test_the_watcher_sees_progress_and_the_plan(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"progress": [], "event": [], "plan": []}
    watcher = Watcher(lambda *args: seen["progress"].append(args), seen["event"].append, seen["plan"].append)
    finetune(check_recipe(recipe_values(tiny_model, rows_file, tmp_path / "run"), "test"), watcher=watcher)
    assert seen["plan"][0].steps == 6
    assert {"step", "validation", "trained", "end"} <= {event["event"] for event in seen["event"]}
    assert any(label == "answering" for label, *_ in seen["progress"])


def _numbers(run: Run) -> list[tuple[Any, ...]]:
    """Events without times."""
    return [
        tuple((key, value) for key, value in event.items() if key not in ("seconds", "report"))
        for event in run.events()
        if event["event"] in ("step", "validation", "trained")
    ]


def test_losses_are_finite(finished: Run) -> None:
    assert all(math.isfinite(event["loss"]) for event in finished.events() if event["event"] == "step")
