"""Several seeds with one verdict, and runs against each other on the rows that they share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from conftest import colour_rows, write_jsonl
from test_pages import HOSTILE, Page
from tunesmith.base import InputError
from tunesmith.cli.app import app
from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.several import compare_systems, corrected
from tunesmith.metrics import bootstrap_over_seeds, mean_rows, paired_bootstrap
from tunesmith.pages.compare import compare_page
from tunesmith.pages.report import report_page
from tunesmith.pipeline.comparing import compare
from tunesmith.pipeline.seeds import Seeds, finetune_seeds
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.report import report_schema

SPEC = EvaluateSpec(resamples=400)


# --- statistics over seeds ---


def seeds_of(means: list[float], rows: int = 400) -> list[Any]:
    rng = np.random.default_rng(1)
    return [mean_rows(rng.normal(mean, 0.1, rows)) for mean in means]


def test_an_interval_over_seeds_covers_their_spread() -> None:
    base = mean_rows(np.zeros(400))
    alike, _ = bootstrap_over_seeds([base], seeds_of([0.3, 0.3, 0.3]), resamples=1000, confidence=0.95, seed=0)
    apart, p = bootstrap_over_seeds([base], seeds_of([0.1, 0.3, 0.5]), resamples=1000, confidence=0.95, seed=0)
    assert alike.low is not None and alike.high is not None and apart.low is not None and apart.high is not None
    assert alike.high - alike.low < 0.04 and apart.low < 0.12 and apart.high > 0.48
    assert apart.difference == pytest.approx(0.3, abs=0.02) and p == pytest.approx(2 / 1001)
    lucky, p = bootstrap_over_seeds([base], seeds_of([-0.1, 0.0, 0.6]), resamples=1000, confidence=0.95, seed=0)
    assert lucky.low is not None and lucky.low < 0 and p > 0.05


def test_one_seed_is_the_paired_bootstrap() -> None:
    base, tuned = seeds_of([0.1]), seeds_of([0.2])
    found, _ = bootstrap_over_seeds(base, tuned, resamples=200, confidence=0.9, seed=7)
    assert found == paired_bootstrap(base[0], tuned[0], resamples=200, confidence=0.9, seed=7)
    with pytest.raises(ValueError, match="at least one each, and the same rows"):
        bootstrap_over_seeds([], tuned, resamples=10, confidence=0.9, seed=0)


def answered(right: int, rows: int = 60) -> list[Judged]:
    return [Judged(f"r:{at}", f"p{at}", ["a"], "a" if at < right else "b", "stop", 1.0, 2) for at in range(rows)]


def test_seeds_are_compared_by_their_means_and_several_runs_are_corrected() -> None:
    entries, warnings = compare_systems(
        ["exact_match", "perplexity"], [answered(10)], [answered(30), answered(40)], SPEC, seed=0
    )
    assert (entries[0]["tuned"], entries[0]["test"]) == (pytest.approx(35 / 60), "bootstrap over rows and seeds")
    assert entries[0]["shown"] == "better" and not warnings
    one, two = ([{**entry, "p": p} for entry in entries[:1]] for p in (0.03, 0.04))
    assert [found[0]["p_corrected"] for found in corrected([one, two], 0.95)] == [0.06, 0.06]
    assert [found[0]["shown"] for found in corrected([one, two], 0.95)] == ["no_difference"] * 2


# --- jobs ---


def values(directory: Path, tiny_model: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "data": {"train": str(write_jsonl(directory / "rows.jsonl", colour_rows(40))), "test": 0.3},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        "evaluate": {"metrics": ["chrf", "exact_match"], "max_new_tokens": 6, "resamples": 60},
        "gate": {"chrf": -100},
        "output": str(directory / "job"),
        "seed": 3,
    }


@pytest.fixture(scope="module")
def seeds(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return finetune_seeds(check_recipe(values(tmp_path_factory.mktemp("seeds"), tiny_model), "recipe.yaml"), 2)


def test_several_seeds_have_one_verdict(seeds: Seeds) -> None:
    report = seeds.report
    assert report is not None
    Draft202012Validator(report_schema()).validate(report)
    assert [one["seed"] for one in report["seeds"]] == [3, 4] and report["verdict"] == "ship"
    assert "12 held-out rows and 2 seeds" in report["sentence"]
    assert report["metrics"][0]["tuned"] == pytest.approx(np.mean([one["values"]["chrf"] for one in report["seeds"]]))
    assert any("standard deviation of chrf over 2 seeds" in text for text in report["warnings"])
    assert "worst of" not in report["forgetting"]["reason"] and "rose the most" in report["forgetting"]["reason"]
    one, two = ((run.path / "evaluation.base.json").read_bytes() for run in seeds.runs)
    assert one == two, "the same held-out rows"
    weights = [(run.path / "adapter" / "adapter_model.safetensors").read_bytes() for run in seeds.runs]
    assert weights[0] != weights[1]
    assert "Seeds" in Page(report_page(report)).text


def test_seeds_are_resumed_only_as_many_as_they_were(seeds: Seeds, tiny_model: Path) -> None:
    asked = check_recipe(values(seeds.path.parent, tiny_model), "recipe.yaml")
    with pytest.raises(InputError, match="this holds seed-3, seed-4, and seed-3, seed-4, seed-5 are asked for"):
        finetune_seeds(asked, 3, resume=True)
    with pytest.raises(InputError, match="not an empty directory"):
        finetune_seeds(asked, 2)
    before = (seeds.path / "report.json").read_text(encoding="utf-8")
    again = finetune_seeds(asked, 2, resume=True)
    created = json.loads(before)["created"]
    assert again.page.is_file() and (again.report or {}) | {"created": created} == json.loads(before)


def test_seeds_of_one_job_are_compared_with_their_base(seeds: Seeds) -> None:
    found = compare([seeds.path])
    assert found["against"] == "base" and [run["seeds"] for run in found["runs"]] == [[3, 4]]
    assert found["comparisons"][0]["metrics"][0]["tuned"] == pytest.approx((seeds.report or {})["metrics"][0]["tuned"])
    assert compare([run.path for run in seeds.runs])["runs"][0]["seeds"] == [3, 4], "runs that differ in their seed"


def changed(seeds: Seeds, name: str, rate: float = 0.02, keep: int | None = None, answer: str | None = None) -> Path:
    """A copy of a run with another learning rate, fewer held-out rows, or other answers."""
    path = seeds.path.parent / name
    shutil.copytree(seeds.runs[0].path, path, dirs_exist_ok=True)
    recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["train"]["learning_rate"] = rate
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for which in ("base", "tuned"):
        file = path / f"evaluation.{which}.json"
        stored = json.loads(file.read_text(encoding="utf-8"))
        stored["rows"] = stored["rows"][:keep]
        for row in stored["rows"] if which == "tuned" and answer is not None else []:
            row["answer"] = row["references"][0] if answer == "right" else answer
        file.write_text(json.dumps(stored), encoding="utf-8")
    return path


def test_runs_are_compared_with_the_first(seeds: Seeds) -> None:
    better, worse = changed(seeds, "better", answer="right"), changed(seeds, "worse", rate=0.5, answer=HOSTILE)
    found = compare([seeds.runs[0].path, better, worse])
    assert [run["name"] for run in found["runs"]] == ["seed-3", "better", "worse"]
    assert found["settings"]["train.learning_rate"] == [0.01, 0.02, 0.5] and "output" not in found["settings"]
    first, second = found["comparisons"]
    assert first["verdict"] == "better" and first["sentence"].startswith("Better than seed-3: better has chrf 100")
    assert first["metrics"][0]["p"] < first["metrics"][0]["p_corrected"] < 0.05, "two runs, so corrected"
    assert second["metrics"][1]["shown"] == "no_difference" and found["rows"] == {"shared": 12, "of": [12, 12, 12]}
    sample = found["samples"][0]
    assert [one["run"] for one in sample["answers"]] == ["seed-3", "better", "worse"]
    page = Page(compare_page(found))
    assert not {"script", "img", "link"} & {tag for tag, _ in page.tags} and HOSTILE in page.text
    assert {"settings", "runs", "metrics", "curves", "samples"} <= set(page.ids)
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_runs_with_other_rows_are_compared_on_those_that_they_share(seeds: Seeds) -> None:
    fewer = changed(seeds, "fewer", keep=7)
    found = compare([seeds.runs[0].path, fewer])
    assert found["rows"] == {"shared": 7, "of": [12, 7]}
    assert "compared on the 7 held-out rows that all share, of 12, 7" in found["warnings"]
    none = changed(seeds, "none")
    for which in ("base", "tuned"):
        file = none / f"evaluation.{which}.json"
        file.write_text(file.read_text(encoding="utf-8").replace('"prompt": "', '"prompt": "other '), encoding="utf-8")
    with pytest.raises(InputError, match="these runs share no held-out row") as caught:
        compare([seeds.runs[0].path, none])
    assert "data.test" in str(caught.value.fix)


def test_what_cannot_be_compared_says_why(seeds: Seeds, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run here"):
        compare([tmp_path])
    with pytest.raises(InputError, match="this run is named twice"):
        compare([seeds.runs[0].path, seeds.path])
    unfinished = changed(seeds, "unfinished")
    (unfinished / "report.json").unlink()
    with pytest.raises(InputError, match="this run is not finished"):
        compare([seeds.runs[0].path, unfinished])
    empty = changed(seeds, "empty", keep=0)
    with pytest.raises(InputError, match="its evaluation was switched off") as caught:
        compare([seeds.runs[0].path, empty])
    assert str(caught.value.where).endswith("empty")


def test_the_command(seeds: Seeds, tmp_path: Path) -> None:
    other = changed(seeds, "other", answer="right")
    page = tmp_path / "compare.html"
    shown = CliRunner().invoke(app, ["compare", str(seeds.path), str(other), "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("Better than job (2 seeds): other has chrf 100")
    assert "train.learning_rate" in shown.output and "reference:" in shown.output and page.is_file()
    as_json = CliRunner().invoke(app, ["compare", str(seeds.path), str(other), "--json"])
    assert json.loads(as_json.output)["comparisons"][0]["run"] == "other"
