"""`tunesmith train` and `tunesmith demo`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.importing import importing
from tunesmith.cli.stages import run_stages
from tunesmith.cli.tables import plan_lines, report_lines
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe
from tunesmith.recipe_stages import StagedRecipe, read_job
from tunesmith.resolved import Plan
from tunesmith.run import RECIPE


def run_training(
    path: Path, overrides: Sequence[str], *, resume: bool, force: Sequence[str] = (), as_json: bool
) -> int:
    """Runs a recipe and returns the exit code: 0, or 3 when a gate said no."""
    if force and not resume:
        raise InputError("--force is for runs that are resumed", fix="add --resume, or write KEY=VALUE without --force")
    recipe, forced = read_job(path, [*overrides, *force]), [text.partition("=")[0] for text in force]
    if isinstance(recipe, StagedRecipe):
        return run_stages(recipe, resume=resume, forced=forced, as_json=as_json)
    return run_recipe(recipe, resume=resume, forced=forced, as_json=as_json)


def run_recipe(recipe: Recipe, *, resume: bool, forced: Sequence[str] = (), as_json: bool) -> int:
    with importing():
        from tunesmith.pipeline.finetune import Watcher, finetune
        from tunesmith.train.parallel import is_main

    quiet_libraries()
    with Display(as_json) as display:

        def planned(plan: Plan) -> None:
            display.planned_steps(plan.steps)
            if not as_json and is_main():
                display.line("\n".join(plan_lines(plan, recipe.model.path)) + "\n")

        watcher = Watcher(display.progress, display.event, planned)
        run = finetune(recipe, resume=resume, watcher=watcher, forced=forced)
    if not is_main():
        return 0
    report: dict[str, Any] = run.report or {}
    if not as_json:
        out("\n".join(report_lines(report)))
        out(f"report: {run.page}")
    return 3 if report["gate"] and report["verdict"] != "ship" else 0


def run_seeds(
    path: Path, overrides: Sequence[str], count: int, *, resume: bool, force: Sequence[str] = (), as_json: bool
) -> int:
    """Runs a recipe with several seeds and returns the exit code of the verdict over all of them."""
    if force:
        raise InputError("--force is for one run", fix=f"resume it by itself: tunesmith train RUN/{RECIPE} --resume")
    recipe = read_job(path, overrides)
    if isinstance(recipe, StagedRecipe):
        raise InputError("a recipe with stages is trained with one seed", where=path, fix="leave out --seeds")
    with importing():
        from tunesmith.pipeline.finetune import Watcher
        from tunesmith.pipeline.seeds import finetune_seeds
        from tunesmith.train.parallel import is_main

    quiet_libraries()
    with Display(as_json) as display:

        def announce(number: int, of: int, own: Recipe) -> None:
            if as_json:
                display.event({"event": "seed", "seed": own.seed, "number": number, "of": of})
            elif is_main():
                display.line(f"seed {own.seed} ({number} of {of}), into {own.output}")

        watcher = Watcher(display.progress, display.event, lambda plan: display.planned_steps(plan.steps))
        seeds = finetune_seeds(recipe, count, resume=resume, watcher=watcher, announce=announce)
    if not is_main():
        return 0
    report: dict[str, Any] = seeds.report or {}
    if as_json:
        out(json.dumps({"event": "seeds", "report": str(seeds.page), **report}))
    else:
        out("\n".join(report_lines(report)))
        out(f"report: {seeds.page}")
    return 3 if report["gate"] and report["verdict"] != "ship" else 0


def run_demo(output: Path, *, as_json: bool) -> int:
    """The main job on the demo model and on rows from Python's own library."""
    from tunesmith.data.stdlib_docstrings import write_demo_data
    from tunesmith.run import Run

    Run.refuse_occupied(output)
    data = output.parent / f"{output.name}-data"
    with Display(as_json) as display:
        display.progress("building rows from Python's own library", 0, None)
        write_demo_data(data)
    return run_recipe(demo_recipe(data, output), resume=False, as_json=as_json)


def demo_recipe(data: Path, output: Path) -> Recipe:
    values = {
        "model": "demo",
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "test": str(data / "test.jsonl"),
        },
        "method": {"kind": "lora", "rank": 16},
        "train": {"steps": 40, "batch_size": 16, "learning_rate": 1e-3, "evaluate_every": 10, "checkpoint_every": 20},
        "evaluate": {"rows": 96, "max_new_tokens": 40, "batch_size": 48},
        "output": str(output),
    }
    return check_recipe(values, "the demo's recipe")
