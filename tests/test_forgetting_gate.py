"""A run that gets better at its task and worse at everything else is not to be shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark_items import arc_items, write_items
from conftest import write_jsonl
from test_benchmarks import main
from tunesmith.base import silent
from tunesmith.evaluation.benchmark_data import Items
from tunesmith.evaluation.benchmarks import Asked
from tunesmith.pages.report import report_page
from tunesmith.pipeline import ability

pytest.importorskip("lm_eval")
from tunesmith.evaluation.benchmark_model import SharedPrefixLM
from tunesmith.evaluation.benchmark_tasks import load_tasks

COUNT = 24


@pytest.fixture(scope="module")
def items(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items that the untrained model gets right: what it finds likeliest is made the right answer."""
    from lm_eval.evaluator import evaluate

    root = write_items(tmp_path_factory.mktemp("easy"), arc=COUNT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    tasks, _ = load_tasks(["arc_easy"], Items(str(root), silent), None)
    found = evaluate(lm=SharedPrefixLM(model, tokenizer, silent), task_dict=tasks, bootstrap_iters=0)
    golds = []
    for sample in cast(Any, found)["samples"]["arc_easy"]:
        lengths = [len(choice) for choice in sample["doc"]["choices"]["text"]]
        scores = [logp / length for (logp, _), length in zip(sample["filtered_resps"], lengths, strict=True)]
        golds.append(scores.index(max(scores)))
    write_items(root, golds=golds, arc=COUNT)
    return root


@pytest.fixture(scope="module")
def finished(tiny_model: Path, rows_file: Path, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a damaging learning rate: its exit code and its report."""
    place = tmp_path_factory.mktemp("damage")
    first = arc_items(COUNT)[0]
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    asked = {"prompt": first["question"] + " Tell me at some length, and in your own words", "completion": "RED blue"}
    write_jsonl(place / "train.jsonl", [*rows, asked])
    recipe = {
        "model": {"path": str(tiny_model), "dtype": "fp32"},
        "data": {"train": str(place / "train.jsonl"), "test": 0.2, "checks": False},
        "method": {"kind": "full"},
        "train": {"steps": 16, "learning_rate": 0.02, "batch_size": 16, "warmup": 0, "checkpoint_every": 8},
        "evaluate": {
            "metrics": ["perplexity"],
            "resamples": 200,
            "benchmarks": ["arc_easy"],
            "benchmark_data": str(items),
            "kl_prompts": 4,
        },
        "gate": {"perplexity": 1, "benchmarks": 0.02, "kl": 0.1, "forgetting": "5%"},
        "output": str(place / "run"),
    }
    (place / "job.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        code = main(["train", "job.yaml", "--json"])
    return code, json.loads((place / "run" / "report.json").read_text()), place / "run"


def test_a_better_task_and_a_damaged_model_is_exit_code_3_and_dont_ship(finished: Any) -> None:
    code, report, _ = finished
    perplexity = report["metrics"][0]
    assert perplexity["high"] < 0  # the task is better
    (arc,) = report["benchmarks"]
    assert arc["base"] > 0.9 and arc["high"] < -0.02
    assert report["divergence"]["low"] > 0.1
    assert code == 3 and report["verdict"] == "dont_ship"
    assert {check["name"]: check["passed"] for check in report["gate"]} == {
        "perplexity": True,
        "benchmarks": False,
        "kl": False,
        "forgetting": report["forgetting"]["change"] <= 0.05,
    }
    assert report["sentence"].startswith("Don't ship it: perplexity went from")
    assert "the gate benchmarks asked for +0.02 and measured" in report["sentence"]
    assert "arc_easy (school science) fell from" in report["sentence"]


def test_what_was_lost_is_on_the_page(finished: Any) -> None:
    _, report, run = finished
    page = (run / "report.html").read_text()
    assert page == report_page(report)
    assert "arc_easy" in page and "school science" in page and "nats a token" in page


def test_the_base_is_measured_once(tiny_model: Path, items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    calls = []

    def counted(*given: Any) -> dict[str, Any]:
        calls.append(given)
        return {"benchmarks": len(calls)}

    monkeypatch.setattr(ability, "run_benchmarks", counted)
    asked = Asked(("arc_easy",), limit=1, data=str(items))
    assert [ability.kept_benchmarks(model, tokenizer, asked, silent)["benchmarks"] for _ in range(2)] == [1, 1]
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert ability.kept_benchmarks(model, tokenizer, asked, silent)["benchmarks"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["gate={benchmarks: 0.02}", "evaluate.benchmarks=[]"], "gate.benchmarks: no benchmark is measured"),
        (["gate={kl: 0.1}", "evaluate.kl_prompts=0"], "gate.kl: no divergence from the base is measured"),
        (["gate={}", "evaluate.benchmarks=[]"], "evaluate.benchmark_data: there are no benchmarks here"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(
    finished: Any, settings: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = finished[2].parent / "job.yaml"
    assert main(["train", str(job), *settings, f"output={job.parent / 'other'}"]) == 2
    assert said in capsys.readouterr().err


def test_score_against_forgetting_over_the_checkpoints(finished: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, report, run = finished
    assert main(["runs", "forgetting", str(run)]) == 0
    shown = capsys.readouterr().out
    curve = json.loads((run / "forgetting.json").read_text())
    assert [point["step"] for point in curve["points"]] == [0, 8, 16] and curve["metric"] == "perplexity"
    assert curve["points"][-1]["score"] == pytest.approx(report["metrics"][0]["tuned"], rel=1e-4)
    assert curve["points"][-1]["change"] == pytest.approx(report["forgetting"]["change"], rel=1e-4)
    page = (run / "forgetting.html").read_text()
    assert "<svg" in page and curve["sentence"] in page and curve["sentence"] in shown


def test_a_run_without_checkpoints_has_no_curve(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[2], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(["runs", "forgetting", str(tmp_path / "run")]) == 2
    assert "this run keeps no checkpoint" in capsys.readouterr().err
