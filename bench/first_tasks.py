"""Trains the recipes of this folder on real data and writes what their reports say.

    python bench/first_tasks.py DATA [--only wikisql] [--out docs/results/first-tasks.md]

DATA is a directory with `sql_wikisql_mlx` and `sum_scitldr`. Runs that are finished already are only read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tunesmith.run import Run

HERE = Path(__file__).parent
HEAD = """# First tasks

Public data, the demo model (SmolLM2-135M-Instruct), LoRA with the defaults; written by
`python bench/first_tasks.py DATA`, recipes in `bench/recipes/`. Two cores without a GPU, arithmetic in bf16. Intervals
are 95 % paired bootstraps over the held-out rows, for one seed.
"""


def with_data(values: Any, data: Path) -> Any:
    """The recipe with `data/` replaced by where the data really is."""
    if isinstance(values, dict):
        return {key: with_data(value, data) for key, value in values.items()}
    return (
        str(data / values.removeprefix("data/")) if isinstance(values, str) and values.startswith("data/") else values
    )


def run_recipe(recipe: Path, data: Path) -> Run:
    output = Path("runs") / recipe.stem
    if not (output / "report.json").is_file():
        changed = Path("runs") / f"{recipe.stem}.yaml"
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(yaml.safe_dump(with_data(yaml.safe_load(recipe.read_text()), data)))
        subprocess.run([sys.executable, "-m", "tunesmith", "train", str(changed)], check=True)
    return Run.open(output)


def section(name: str, run: Run) -> str:
    report = run.report or {}
    versions = run.read("environment.json")["versions"]
    forgetting, predicted, measured = report["forgetting"], report["predicted"], report["measured"]
    lines = [f"## {name}", "", report["sentence"], ""]
    lines += ["| metric | base | tuned | difference | interval | rows |", "|---|---|---|---|---|---|"]
    for m in report["metrics"]:
        span = f"{m['low']:+.4f} … {m['high']:+.4f}"
        lines.append(
            f"| {m['name']} | {m['base']:.4f} | {m['tuned']:.4f} | {m['difference']:+.4f} | {span} | {m['n']} |"
        )
    text = f"{forgetting['base']:.2f} → {forgetting['tuned']:.2f} ({forgetting['change']:+.1%})"
    used, lost = report["data"]["rows_used"], report["data"]["rows_lost"]
    memory = [f"{value['peak_bytes'] / 2**30:.2f} GiB" for value in (predicted, measured)]
    minutes = [f"{value['seconds'] / 60:.1f} min" for value in (predicted, measured)]
    lines += [
        "",
        f"General text: perplexity {text}.",
        f"Data: {used:,} rows, {report['data']['target_tokens_used']:,} target tokens; {lost} rows lost.",
        f"Memory: {memory[0]} predicted, {memory[1]} measured. Time: {minutes[0]} predicted, {minutes[1]} measured.",
        f"Versions: torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/first-tasks.md"))
    parser.add_argument("--only", help="one of the recipes, by its name")
    given = parser.parse_args()
    recipes = sorted(HERE.glob(f"recipes/{given.only or '*'}.yaml"))
    parts = [HEAD, *(section(recipe.stem, run_recipe(recipe, given.data)) for recipe in recipes)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(parts), encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
