"""The documentation holds: its code runs, its pages are up to date, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from conftest import colour_rows, write_jsonl
from tunesmith.recipe_file import check_recipe, parse_yaml
from tunesmith.recipe_reference import recipe_reference
from tunesmith.recipe_stages import staged_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", range(len(CODE)))
def test_the_code_of_the_readme_runs(block: int, tiny_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", colour_rows(48))
    write_jsonl(tmp_path / "test.jsonl", colour_rows(12, start=200))
    code = CODE[block].replace('"demo"', repr(str(tiny_model)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    results = [path for path in ("adapter", "merged", "runs/api/report.html") if (tmp_path / path).exists()]
    assert results


def test_the_readme_has_both_ways_of_use() -> None:
    assert len(CODE) == 2
    assert "tunesmith.finetune(" in CODE[0]
    for name in ("load", "adapt", "step", "evaluate", "merge"):
        assert name in CODE[1]
    assert len(CODE[1].splitlines()) <= 25


def test_the_recipes_of_the_documentation_are_valid() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = 0
    for page in pages:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            values, lines = parse_yaml(text, page.name)
            if page.name == "import.md":
                continue
            if "stages" in values:
                staged_recipe({"model": "demo", **values}, page.name, lines)
            else:
                check_recipe({"model": "demo", **values}, page.name, lines)
            found += 1
    assert found >= 3


def test_the_recipe_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page.strip() == recipe_reference().strip(), "run: tunesmith recipe --reference > docs/recipe.md"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_public_names_are_these() -> None:
    names = (
        "Batch DataSpec EvaluateSpec Example Full InputError Interrupted Lora ModelSpec Plan Recipe Run Supervised "
        "TrainSpec TrainingError TunesmithError batches evaluate finetune load merge pack read_recipe step"
    )
    assert sorted(tunesmith.__all__) == names.split()
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is not None
    with pytest.raises(AttributeError):
        _ = tunesmith.nothing  # pyright: ignore


def test_importing_the_package_is_quick() -> None:
    code = "import sys, tunesmith; assert not {'torch', 'pydantic'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
