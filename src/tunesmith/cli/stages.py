"""Recipes with stages, as a person or a program sees them: plans, training, runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.importing import importing
from tunesmith.cli.tables import WORDS, aligned, plan_lines, report_lines
from tunesmith.recipe import Recipe
from tunesmith.recipe_stages import Stage, StagedRecipe, read_job
from tunesmith.resolved import Plan

if TYPE_CHECKING:
    from tunesmith.pipeline.chain import Chain

GATE = 3


def show_stage_plans(recipe: StagedRecipe, *, as_json: bool) -> None:
    """Prints the plan of every stage."""
    with importing():
        from tunesmith.pipeline.stages import plan_stages, plans_json

    quiet_libraries()
    with Display(as_json) as display:
        plans = plan_stages(recipe, display.progress)
    if as_json:
        out(plans_json(plans))
        return
    for number, item in enumerate(plans, 1):
        out(heading(number, len(plans), item.stage))
        if item.plan is not None:
            out("\n".join(plan_lines(item.plan, item.model)))
        out("\n".join(f"note: {note}" for note in item.notes) + "\n" if item.notes else "")


def heading(number: int, of: int, stage: Stage) -> str:
    return f"stage {number} of {of}: {stage.name} ({stage.recipe.objective.kind}, from {stage.recipe.model.path})"


def run_stages(recipe: StagedRecipe, *, resume: bool, forced: Sequence[str], as_json: bool) -> int:
    """Runs every stage and returns the exit code: 0, or 3 when the gate of one said no."""
    with importing():
        from tunesmith.pipeline.stages import finetune_stages
        from tunesmith.pipeline.work import Watcher
        from tunesmith.train.parallel import is_main

    quiet_libraries()
    model = ""
    with Display(as_json) as display:

        def announce(number: int, stage: Stage) -> None:
            nonlocal model
            model = stage.recipe.model.path
            if as_json and is_main():
                display.event({"event": "stage", "name": stage.name, "number": number, "of": len(recipe.stages)})
            elif is_main():
                display.line(heading(number, len(recipe.stages), stage))

        def planned(plan: Plan) -> None:
            display.planned_steps(plan.steps)
            if not as_json and is_main():
                display.line("\n".join(plan_lines(plan, model)) + "\n")

        watcher = Watcher(display.progress, display.event, planned)
        chain = finetune_stages(recipe, resume=resume, watcher=watcher, forced=forced, announce=announce)
    if not is_main():
        return 0
    report = chain.report()
    out(json.dumps({"event": "stages", **report}) if as_json else "\n".join(_ended(chain, report)))
    return GATE if report["stopped"] is not None else 0


def _ended(chain: Chain, report: dict[str, Any]) -> list[str]:
    """What the stages came to, as it is printed."""
    lines = []
    for stage in chain.stages:
        if (own := stage.run.report) is not None:
            lines += [f"stage {stage.name}", *report_lines(own), ""]
    rows = [["stage", "state", "verdict", "run"]]
    for one in report["stages"]:
        rows.append([one["name"], one["state"], WORDS.get(one["verdict"], "–"), str(chain.path / one["run"])])
    lines += aligned(rows)
    if report["stopped"] is not None and report["stages"][-1]["name"] != report["stopped"]:
        lines.append(f"stage {report['stopped']} did not pass its gate: the stages after it were not run")
    return [*lines, f"report: {chain.path / 'report.html'}"]


def read_stage(path: Path, overrides: Sequence[str], name: str | None) -> Recipe:
    """The recipe of one stage, or of a recipe without stages, with a model that is here now.

    Raises:
        InputError: when there is no such stage, or none was named and there are several.
    """
    recipe = read_job(path, overrides)
    if isinstance(recipe, Recipe):
        if name is not None:
            raise InputError("this recipe has no stages", where=path, fix="leave out --stage")
        return recipe
    from tunesmith.pipeline.stages import recipe_to_plan

    names = [stage.name for stage in recipe.stages]
    if name not in names:
        what = "this recipe has stages, and one is asked for" if name is None else f"there is no stage {name!r}"
        raise InputError(what, where=path, fix=f"name one with --stage: {', '.join(names)}")
    return recipe_to_plan(recipe, recipe.stages[names.index(name)])[0]
