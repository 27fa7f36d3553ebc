"""`tunesmith rerun`: the same recipe on a new base or new data, and the comparison with the old run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from conftest import build_model, colour_rows, write_jsonl
from past_runs import past_run
from tunesmith.base import InputError, Interrupted
from tunesmith.cli.app import app
from tunesmith.pipeline.lineage import read_lineage
from tunesmith.pipeline.rerun import compare_runs, plan_rerun, rerun
from tunesmith.pipeline.verifying import verify_run
from tunesmith.pipeline.work import Watcher
from tunesmith.run import Run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def old(tiny_model: Path, place: Path) -> Run:
    return past_run(tiny_model, place)


@pytest.fixture(scope="module")
def more_rows(place: Path) -> Path:
    return write_jsonl(place / "more.jsonl", colour_rows(80))


@pytest.fixture(scope="module")
def second(old: Run, more_rows: Path) -> Result:
    """The old recipe on more rows and more steps, from the command line."""
    changes = [f"data.train={more_rows}", "train.steps=30"]
    return CliRunner().invoke(app, ["rerun", str(old.path), *changes])


def test_the_new_run_stands_beside_the_old_one_and_is_compared_with_it(old: Run, second: Result, place: Path) -> None:
    assert second.exit_code == 0, second.output
    new = Run.open(place / "first-2")
    comparison = new.read("comparison.json")
    assert comparison["same_rows"] is True and comparison["reason"] is None
    assert comparison["changed"]["train.steps"] == [2, 30] and "output" not in comparison["changed"]
    assert comparison["verdict"] in ("better", "worse", "no_difference")
    assert comparison["sentence"] in second.stdout
    assert "changed: train.steps 2 → 30" in second.stdout
    tuned = {
        run.path.name: {entry["name"]: entry["tuned"] for entry in (run.report or {})["metrics"]} for run in (old, new)
    }
    for entry in comparison["metrics"]:
        assert entry["old"] == tuned["first"][entry["name"]] and entry["new"] == tuned["first-2"][entry["name"]]
        assert entry["difference"] == pytest.approx(entry["new"] - entry["old"])
        assert entry["low"] <= entry["difference"] <= entry["high"]
    perplexity = next(entry for entry in comparison["metrics"] if entry["name"] == "perplexity")
    assert perplexity["high"] < 0, "thirty steps are better than two"


def test_the_new_run_knows_the_old_one_and_is_whole(second: Result, place: Path) -> None:
    new = Run.open(place / "first-2")
    lineage = read_lineage(new)
    assert lineage is not None
    assert [(parent["how"], parent["run"]) for parent in lineage["parents"]] == [("rerun", "../first")]
    assert all(part.state == "ok" for part in verify_run(new)), "the manifest knows the comparison too"


def test_without_changes_nothing_differs(old: Run, place: Path) -> None:
    again = plan_rerun(old.path, [f"output={place / 'same'}"])
    run, comparison = rerun(again)
    assert comparison is not None and run.path == place / "same"
    assert comparison["changed"] == {} and comparison["verdict"] == "no_difference"
    assert all(entry["difference"] == entry["low"] == entry["high"] == 0 for entry in comparison["metrics"])
    assert "No difference shown to" in comparison["sentence"]


def test_a_new_base_with_another_tokenizer_has_no_common_perplexity(old: Run, place: Path) -> None:
    base = build_model(place / "base", tie_word_embeddings=True)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, comparison = rerun(plan_rerun(old.path, [f"model={base}", f"output={place / 'other-base'}"]))
    assert comparison is not None and comparison["same_rows"]
    assert comparison["changed"] == {"model.path": [str(yaml.safe_load(_recipe(old))["model"]["path"]), str(base)]}
    assert "perplexity" not in {entry["name"] for entry in comparison["metrics"]}
    assert any("perplexity is left out" in text for text in comparison["warnings"])


def test_other_held_out_rows_are_put_side_by_side(old: Run, place: Path) -> None:
    other = write_jsonl(place / "other-test.jsonl", colour_rows(8, start=400))
    output = place / "other-rows"
    done = CliRunner().invoke(app, ["rerun", str(old.path), f"data.test={other}", f"output={output}", "--json"])
    assert done.exit_code == 0, done.output
    comparison = json.loads(done.stdout.splitlines()[-1])
    assert comparison["event"] == "comparison" and comparison["verdict"] is None and comparison["metrics"] == []
    assert comparison["reason"] == "they were judged on different rows (12 and 8)"
    assert "side by side" in comparison["sentence"]
    assert comparison["results"]["old"]["metrics"] and comparison["results"]["new"]["metrics"]


def test_raw_text_is_the_same_when_it_is_the_same_place_of_the_same_file(tiny_model: Path, tmp_path: Path) -> None:
    for name, count in (("rows.jsonl", 20), ("held-out.jsonl", 6)):
        write_jsonl(tmp_path / name, [{"text": f"{count} lines and this is {at}"} for at in range(count)])
    evaluate = {"metrics": ["perplexity"]}
    first = past_run(tiny_model, tmp_path, "raw", evaluate=evaluate)
    _, comparison = rerun(plan_rerun(first.path, ["train.steps=3"]))
    assert comparison is not None and comparison["same_rows"] and comparison["metrics"][0]["name"] == "perplexity"
    write_jsonl(tmp_path / "held-out.jsonl", [{"text": f"other lines and this is {at}"} for at in range(6)])
    _, comparison = rerun(plan_rerun(first.path))
    assert comparison is not None and comparison["reason"] == "they were judged on different rows (6 and 6)"


def test_runs_that_were_not_judged_cannot_be_compared(old: Run, place: Path, tmp_path: Path) -> None:
    unfinished = Run(shutil.copytree(old.path, tmp_path / "unfinished"))
    (unfinished.path / "report.json").unlink()
    assert compare_runs(unfinished, old)["reason"] == f"{unfinished.path} is not finished"
    blind = Run(shutil.copytree(old.path, tmp_path / "blind"))
    blind.write("evaluation.tuned.json", {"rows": [], "general": None})
    assert compare_runs(blind, old)["reason"] == "evaluation was switched off"


def test_names_of_new_directories(old: Run, second: Result, place: Path) -> None:
    assert Path(plan_rerun(old.path).recipe.output) == place / "first-3"
    assert Path(plan_rerun(place / "first-2").recipe.output) == place / "first-3", "a rerun of a rerun is the next one"
    before = os.getcwd()
    try:
        os.chdir(old.path)
        assert Path(plan_rerun(".").recipe.output) == place / "first-3"
    finally:
        os.chdir(before)


def test_an_interrupted_rerun_goes_on_with_its_own_recipe(tiny_model: Path, tmp_path: Path) -> None:
    old = past_run(tiny_model, tmp_path)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        rerun(plan_rerun(old.path, ["train.steps=4"]), Watcher(event=stop))
    assert Path(plan_rerun(old.path).recipe.output).name == "first-3", "what was begun is not overwritten"
    again = plan_rerun(old.path, resume=True)
    assert Path(again.recipe.output).name == "first-2" and again.recipe.train.steps == 4
    run, comparison = rerun(again)
    assert run.path == tmp_path / "first-2" and comparison is not None and comparison["same_rows"]
    assert run.summary()["steps"] == 4
    with pytest.raises(InputError, match="no rerun of this run was interrupted"):
        plan_rerun(old.path, resume=True)


def test_a_named_rerun_is_begun_or_gone_on_with_by_one_command(old: Run, place: Path, tmp_path: Path) -> None:
    output = tmp_path / "named"
    for _ in range(2):
        again = plan_rerun(old.path, [f"output={output}", "train.steps=1"], resume=True)
        run, comparison = rerun(again)
        assert run.path == output and comparison is not None and comparison["changed"] == {"train.steps": [2, 1]}


def test_what_is_wrong_is_told(old: Run, place: Path) -> None:
    with pytest.raises(InputError, match="there is no run here"):
        plan_rerun(place / "nothing")
    with pytest.raises(InputError, match=r"unknown key 'stesp'"):
        plan_rerun(old.path, ["train.stesp=3"])
    with pytest.raises(InputError, match="is not an empty directory"):
        rerun(plan_rerun(old.path, [f"output={place}"]))


def _recipe(run: Run) -> str:
    return (run.path / "recipe.yaml").read_text(encoding="utf-8")
