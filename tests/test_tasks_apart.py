"""Several tasks in one run: each is reported apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import colour_rows, write_jsonl
from tunesmith.cli.tables import report_lines
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe_file import check_recipe


@pytest.mark.parametrize("named", [True, False])
def test_every_task_has_figures_of_its_own(named: bool, tiny_model: Path, tmp_path: Path) -> None:
    rows = colour_rows(80)
    if named:
        given = [
            {"task": "say" if at % 2 else "tell", "input": row["prompt"], "output": row["completion"]}
            for at, row in enumerate(rows)
        ]
        train: object = str(write_jsonl(tmp_path / "tasks.jsonl", given))
        names = ["say", "tell"]
    else:
        files = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:40]), ("b", rows[40:]))]
        train = [{"path": str(files[0]), "weight": 2}, {"path": str(files[1]), "weight": 1}]
        names = [str(file) for file in files]
    values = {
        "model": str(tiny_model),
        "data": {"train": train, "test": 0.3, "checks": False},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"max_new_tokens": 4, "forgetting": "off", "resamples": 20},
        "output": str(tmp_path / "run"),
    }
    run = finetune(check_recipe(values, "test"))
    report = run.report
    assert report is not None
    assert [task["name"] for task in report["tasks"]] == names
    assert sum(task["rows"] for task in report["tasks"]) == report["metrics"][0]["n"]
    whole = report["metrics"][0]
    parts = [(task["rows"], task["metrics"][0]["tuned"]) for task in report["tasks"]]
    assert whole["tuned"] == pytest.approx(sum(n * value for n, value in parts) / sum(n for n, _ in parts))
    assert all(name in "\n".join(report_lines(report)) for name in names)
    assert all(name in run.page.read_text(encoding="utf-8") for name in names)
