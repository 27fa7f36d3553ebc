"""How long commands take as whole processes, from their start to their answer.

    python bench/startup.py [--runs 5] [--json]

`--help`; `plan` for a directory with the demo model's configuration and nothing else; `train` on the demo model up to
the event of its first optimizer step, with the model and the rows in the cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from docstring_rows import docstring_rows, write_rows
from train_report import head
from train_speed import environment
from turns import say

COMMAND = [sys.executable, "-m", "tunesmith"]
AIMS = {"--help": 0.3, "plan without weights": 6.0, "train to the first step": 8.0}
"""Seconds."""


def seconds_of(arguments: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"tunesmith {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return seconds


def seconds_to_first_step(recipe: Path, output: Path) -> float:
    """From the command to the line of the first step; the run is stopped then and its directory removed."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, "train", str(recipe), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    seconds = None
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            seconds = time.perf_counter() - started
            break
    process.kill()
    _, said = process.communicate()
    shutil.rmtree(output, ignore_errors=True)
    if seconds is None:
        raise SystemExit(f"tunesmith train ended before its first step:\n{said[-2000:]}")
    return seconds


def write_recipe(directory: Path, model: str) -> Path:
    """A recipe with a small job on ``model``; judging is off, because it would come before the first step."""
    rows = directory / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, docstring_rows(800))
    train = {"steps": 1000, "batch_size": 8, "checkpoint_every": "off"}
    data = {"train": str(rows), "max_length": 512, "overlong": "drop"}
    recipe = {"model": model, "data": data, "train": train, "evaluate": "off", "output": str(directory / "run")}
    path = directory / f"{Path(model).name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def measure(runs: int, directory: Path) -> dict[str, list[float]]:
    """Seconds of every run of every command; the commands take turns, and one round before is not counted."""
    from tunesmith.models.demo import demo_model

    bare = directory / "bare"
    bare.mkdir()
    shutil.copy(demo_model() / "config.json", bare)
    plan, train = write_recipe(directory, str(bare)), write_recipe(directory, "demo")
    jobs: dict[str, Callable[[], float]] = {
        "--help": lambda: seconds_of(["--help"]),
        "plan without weights": lambda: seconds_of(["plan", str(plan)]),
        "train to the first step": lambda: seconds_to_first_step(train, directory / "run"),
    }
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(runs + 1):
        took = {name: job() for name, job in jobs.items()}
        said = ", ".join(f"{name} {value:.2f} s" for name, value in took.items())
        say(f"{'warm-up' if number == 0 else f'round {number} of {runs}'}: {said}")
        if number:
            for name, value in took.items():
                found[name].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(given.runs, Path(temporary))
    about = environment()
    print(f"{head(about)}\n")
    print("| command | median | smallest … largest | aim |\n|---|---|---|---|")
    for name, values in found.items():
        spread = f"{min(values):.2f} … {max(values):.2f}"
        print(f"| {name} | {statistics.median(values):.2f} s | {spread} s | {AIMS[name]} s |")
    if given.json:
        medians = {name: {"median": statistics.median(values), "runs": values} for name, values in found.items()}
        print(json.dumps({**about, "commands": medians}))


if __name__ == "__main__":
    main()
