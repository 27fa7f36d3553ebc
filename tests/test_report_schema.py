"""The published schema of report.json: it is current, strict, and every report that is written keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from sklearn.metrics import confusion_matrix

from conftest import write_jsonl
from tunesmith.metrics import confusion
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe_file import check_recipe
from tunesmith.report import report_schema
from tunesmith.run import Run

STORED = Path(__file__).parent.parent / "docs" / "report.schema.json"


def rows(count: int, start: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"Is {at} even?", "completion": "yes" if at % 2 == 0 else "no"} for at in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("reported")
    code = directory / "own.py"
    code.write_text("def shortness(prompt, answer, references):\n    return -float(len(answer))\n", encoding="utf-8")
    recipe = {
        "model": str(tiny_model),
        "data": {
            "train": str(write_jsonl(directory / "train.jsonl", rows(24, 0))),
            "test": str(write_jsonl(directory / "test.jsonl", rows(14, 100))),
            "validation": 0.2,
        },
        "train": {"steps": 3, "batch_size": 8},
        "evaluate": {
            "metrics": ["accuracy", f"{code}:shortness", "bits_per_byte"],
            "max_new_tokens": 4,
            "resamples": 50,
        },
        "gate": {"shortness": -1000, "forgetting": 5},
        "output": str(directory / "run"),
    }
    return finetune(check_recipe(recipe, "recipe.yaml"))


def validate(report: dict[str, Any]) -> None:
    Draft202012Validator(report_schema()).validate(report)


def test_the_schema_in_the_documentation_is_current() -> None:
    Draft202012Validator.check_schema(report_schema())
    assert json.loads(STORED.read_text(encoding="utf-8")) == report_schema(), (
        "write it anew: tunesmith runs schema > docs/report.schema.json"
    )


def test_a_written_report_keeps_the_schema(run: Run) -> None:
    report = run.report
    assert report is not None
    validate(report)
    names = [entry["name"] for entry in report["metrics"]]
    assert names == ["accuracy", "shortness", "bits_per_byte", "perplexity"]
    assert report["metrics"][0]["test"] == "exact McNemar" and report["metrics"][1]["test"] == "paired permutation"
    assert report["confusion"]["labels"] == ["no", "yes"]
    assert sum(map(sum, report["confusion"]["tuned"])) == 14
    assert any(item["name"].endswith("own.py:shortness") for item in report["resolved"]), "the hash of the user's code"
    assert {"accuracy", "shortness"} <= {check["name"] for check in report["gate"]} | {"accuracy"}


def test_a_report_that_breaks_the_schema_is_refused(run: Run) -> None:
    report = run.report or {}
    for wrong in ({"verdict": "maybe"}, {"unknown": 1}, {"metrics": [{"name": "f1"}]}, {"forgetting": {}}):
        with pytest.raises(ValidationError):
            validate({**report, **wrong})
    with pytest.raises(ValidationError):
        validate({name: value for name, value in report.items() if name != "sentence"})


def test_the_confusion_matrix_is_scikit_learns() -> None:
    right = ["yes", "no", "perhaps", "no", "yes", "no", "no", "yes"]
    given = ["yes", "yes", "perhaps", "No ", "no", "no", "maybe", "yes"]
    found = confusion(given, [[label] for label in right])
    assert found is not None
    labels, counts = found
    assert labels == ["no", "perhaps", "yes"]
    known = [(a, b.strip().lower()) for a, b in zip(right, given, strict=True) if b != "maybe"]
    expected = confusion_matrix([a for a, _ in known], [b for _, b in known], labels=labels)
    assert counts[:, :-1].tolist() == expected.tolist() and counts[:, -1].tolist() == [1, 0, 0]
    assert confusion(["a"] * 4, [["a"]] * 4) is None and confusion(["a", "b"], [["a"], ["b"]]) is None
    assert confusion(["a"] * 9, [["a | b"]] * 9) is None
