"""The command line as a subprocess: exit codes, JSON, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import SOURCE, tunesmith
from conftest import colour_rows, write_jsonl
from tunesmith import __version__


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data, a recipe and a finished run, as a user has it."""
    root = tmp_path_factory.mktemp("place")
    write_jsonl(root / "rows.jsonl", colour_rows(60))
    write_jsonl(root / "held-out.jsonl", colour_rows(12, start=300))
    recipe = {
        "model": str(tiny_model),
        "data": {"train": "rows.jsonl", "validation": 0.1, "test": "held-out.jsonl"},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 4, "resamples": 50, "forgetting": "off"},
    }
    (root / "colours.yaml").write_text(yaml.safe_dump(recipe))
    done = tunesmith("train", "colours.yaml", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "rows used" in done.stdout and "report: runs/colours/report.html" in done.stdout.replace("\\", "/")
    assert "step 4/4" in done.stderr
    return root


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_is_quick_to_import_and_lists_the_verbs() -> None:
    code = (
        "import sys\nsys.argv = ['tunesmith', '--help']\nfrom tunesmith.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'rich.markdown'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SOURCE}
    )
    assert shown.returncode == 0, shown.stderr
    for verb in (
        "train",
        "plan",
        "data",
        "evaluate",
        "generate",
        "chat",
        "merge",
        "quantize",
        "runs",
        "rerun",
        "vote",
        "doctor",
        "recipe",
    ):
        assert verb in shown.stdout


def test_train_as_json_is_one_event_a_line(place: Path) -> None:
    done = tunesmith("train", "colours.yaml", "output=runs/json", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    events = lines(done.stdout)
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    assert events[-1]["event"] == "end" and events[-1]["verdict"] in ("ship", "dont_ship", "no_difference")


def test_an_override_is_checked_like_the_file(place: Path) -> None:
    wrong = tunesmith("plan", "colours.yaml", "train.stesp=3", cwd=place)
    assert wrong.returncode == 2
    assert "train.stesp" in wrong.stderr and "'steps'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_typo_names_file_line_and_key(place: Path) -> None:
    (place / "typo.yaml").write_text("model: x\ndata:\n  train: rows.jsonl\nmethod:\n  kind: lora\n  rnk: 8\n")
    wrong = tunesmith("train", "typo.yaml", cwd=place)
    assert wrong.returncode == 2
    assert "typo.yaml:6 method.rnk" in wrong.stderr and "did you mean 'rank'" in wrong.stderr


def test_wrong_arguments_exit_with_2(place: Path) -> None:
    assert tunesmith("trian", cwd=place).returncode == 2
    assert tunesmith("train", cwd=place).returncode == 2
    assert tunesmith("train", "nothing.yaml", cwd=place).returncode == 2
    assert tunesmith("generate", "nothing/at/all", "hello", cwd=place).returncode == 2
    assert tunesmith("merge", "runs/nothing", "out", cwd=place).returncode == 2


def test_an_error_as_json(place: Path) -> None:
    wrong = tunesmith("plan", "colours.yaml", "data.train=nothing.jsonl", "data.formt=text", "--json", cwd=place)
    assert wrong.returncode == 2
    assert lines(wrong.stdout)[-1]["event"] == "error"


def test_an_occupied_output_exits_with_2_and_is_unharmed(place: Path) -> None:
    before = (place / "runs" / "colours" / "report.json").read_bytes()
    again = tunesmith("train", "colours.yaml", cwd=place)
    assert again.returncode == 2 and "--resume" in again.stderr
    assert (place / "runs" / "colours" / "report.json").read_bytes() == before
    resumed = tunesmith("train", "colours.yaml", "--resume", cwd=place)
    assert resumed.returncode == 0


def test_a_gate_that_says_no_exits_with_3(place: Path) -> None:
    gated = tunesmith("train", "colours.yaml", "output=runs/gated", "gate={rougeL: +0.99}", cwd=place)
    assert gated.returncode == 3, gated.stderr
    assert "DON'T SHIP" in gated.stdout and "gate rougeL" in gated.stdout
    assert json.loads((place / "runs" / "gated" / "report.json").read_text())["verdict"] == "dont_ship"


def test_plan_as_json(place: Path) -> None:
    planned = tunesmith("plan", "colours.yaml", "--json", cwd=place)
    plan = json.loads(planned.stdout)
    assert 0 < plan["parameters"]["trainable"] < plan["parameters"]["total"]
    assert {"weights", "gradients", "optimizer", "activations", "peak_bytes"} <= plan["memory"].keys()
    assert plan["time"]["seconds"] >= 0
    assert not plan["workload"]["estimated"]
    assert all({"name", "value", "reason"} <= item.keys() for item in plan["resolved"])


def test_a_config_alone_is_enough_for_a_plan(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    for override in ("data.train=rows.jsonl", "data.train=not-there-yet.jsonl"):
        arguments = ("plan", "colours.yaml", f"model={tmp_path}", override, "data.test=auto", "--json")
        planned = tunesmith(*arguments, cwd=place)
        assert planned.returncode == 0, planned.stderr
        plan = json.loads(planned.stdout)
        assert plan["workload"]["estimated"] is True
        assert any("estimated" in note for note in plan["notes"])


def test_generate_and_its_json(place: Path) -> None:
    answers = tunesmith(
        "generate", "runs/colours", "Say red 0 red", "Say old 8 soft", "--json", "--max-new-tokens", 3, cwd=place
    )
    assert answers.returncode == 0, answers.stderr
    found = lines(answers.stdout)
    assert [line["prompt"] for line in found] == ["Say red 0 red", "Say old 8 soft"]
    for line in found:
        assert line["finish_reason"] in ("stop", "length") and line["tokens"] <= 3
        assert isinstance(line["text"], str)
    again = tunesmith(
        "generate", "runs/colours", "Say red 0 red", "Say old 8 soft", "--json", "--max-new-tokens", 3, cwd=place
    )
    assert again.stdout == answers.stdout


def test_chat_reads_from_a_pipe(place: Path) -> None:
    talk = tunesmith("chat", "runs/colours", "--max-new-tokens", 3, cwd=place, stdin="hello\nand again\n\n")
    assert talk.returncode == 0, talk.stderr


def test_evaluate_compares_a_run_with_its_base_and_scores_a_model(place: Path, tiny_model: Path) -> None:
    compared = tunesmith("evaluate", "runs/colours", "--data", "held-out.jsonl", "--json", cwd=place)
    assert compared.returncode == 0, compared.stderr
    [result] = json.loads(compared.stdout)["results"]
    assert {"base", "tuned", "difference", "low", "high"} <= result["metrics"][0].keys()
    report = json.loads((place / "runs" / "colours" / "report.json").read_text())
    wanted = {entry["name"]: entry["tuned"] for entry in report["metrics"]}
    for entry in result["metrics"]:
        assert entry["tuned"] == pytest.approx(wanted[entry["name"]], rel=0.05, abs=1e-6)
    alone = tunesmith("evaluate", tiny_model, "--data", "held-out.jsonl", "--metric", "chrf", "--json", cwd=place)
    [result] = json.loads(alone.stdout)["results"]
    assert {"chrf", "perplexity"} == {entry["name"] for entry in result["metrics"]}


def test_quantize_saves_a_base_that_answers(place: Path, tiny_model: Path) -> None:
    saved = tunesmith("quantize", tiny_model, "small", "--to", "fp4", "--no-double", cwd=place)
    assert saved.returncode == 0, saved.stderr
    assert "in fp4, scales in fp32" in saved.stdout and "gemm_4bit" not in saved.stderr
    said = tunesmith("generate", "small", "Say red 0 red", "--max-new-tokens", 3, cwd=place)
    assert said.returncode == 0, said.stderr
    again = tunesmith("quantize", "small", "smaller", cwd=place)
    assert again.returncode == 2 and "stored as fp4, scales in fp32 already" in again.stderr


def test_merge_says_its_figures_and_writes_a_plain_model(place: Path) -> None:
    merged = tunesmith("merge", "runs/colours", "merged", cwd=place)
    assert merged.returncode == 0, merged.stderr
    assert "of greedy tokens the same" in merged.stdout and "not the base" in merged.stdout
    figures = json.loads((place / "merged" / "merge.json").read_text())
    assert figures["passed"] and figures["layers"] == 14 and figures["differs_from_base"] > figures["mean_kl"]
    said = tunesmith("generate", "merged", "Say red 0 red", "--max-new-tokens", 3, cwd=place)
    assert said.returncode == 0, said.stderr
    assert tunesmith("merge", "runs/colours", "merged", cwd=place).returncode == 2


def test_data_show_prints_and_writes_a_page(place: Path) -> None:
    shown = tunesmith("data", "show", "colours.yaml", "--rows", 1, cwd=place)
    assert shown.returncode == 0, shown.stderr
    assert "⟦" in shown.stdout and "<|im_end|>⟧" in shown.stdout and "trained" in shown.stdout
    page = tunesmith("data", "show", "colours.yaml", "--html", "tokens.html", cwd=place)
    assert page.returncode == 0 and "<html" in (place / "tokens.html").read_text(encoding="utf-8")


def test_runs_lists_states_and_verdicts(place: Path) -> None:
    listed = tunesmith("runs", "--json", cwd=place)
    found = {Path(item["run"]).name: item for item in json.loads(listed.stdout)}
    assert found["colours"]["state"] == "done" and found["colours"]["verdict"]
    assert "colours" in tunesmith("runs", cwd=place).stdout


def test_the_schema_describes_every_field() -> None:
    schema = json.loads(tunesmith("recipe", "--schema").stdout)
    bare = [
        f"{name}.{field}"
        for name, definition in {**schema["$defs"], "Recipe": schema}.items()
        for field, value in definition.get("properties", {}).items()
        if "description" not in value and "$ref" not in value
    ]
    assert not bare, bare
    assert {"LadderSpec", "FactsSpec"} <= set(schema["$defs"]) and {"ladder", "stages"} <= set(schema["properties"])


def test_the_version_is_told() -> None:
    assert tunesmith("--version").stdout == f"tunesmith {__version__}\n"


def test_recipe_import_says_key_by_key(tmp_path: Path) -> None:
    theirs = {
        "base_model": "org/model",
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 0.0002,
        "num_epochs": 1,
    }
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(theirs))
    done = tunesmith("recipe", "import", "axolotl.yaml", "--out", "ours.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lora_r" in done.stderr and "method.rank" in done.stderr
    assert yaml.safe_load((tmp_path / "ours.yaml").read_text())["train"]["batch_size"] == 8
    assert tunesmith("recipe", "import", "ours.yaml", cwd=tmp_path).returncode == 2
