"""A recipe with stages: planned as a whole, run one after the other, each a run of its own; resumed where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.base import InputError, Progress, silent
from tunesmith.files import remove_directory, write_text
from tunesmith.pipeline.chain import CHAIN, Chain, gate_said_no
from tunesmith.pipeline.estimating import estimate_job
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.planning import Planned, plan_job
from tunesmith.pipeline.resuming import changed_between, changed_keys, refuse_changes
from tunesmith.pipeline.work import Watcher
from tunesmith.plan.hardware import detect_hardware
from tunesmith.recipe import Recipe
from tunesmith.recipe_stages import Stage, StagedRecipe
from tunesmith.resolved import Plan
from tunesmith.run import RECIPE, Run
from tunesmith.train.parallel import is_main, join_processes, leave_processes, wait_for_all

PlanJob = Callable[[Recipe, Progress], Planned]
Announce = Callable[[int, Stage], None]
"""Called before a stage begins or is gone on with: its number, counted from 1, and the stage."""


@dataclass(frozen=True)
class StagePlan:
    """What can be known of a stage before those that it uses are done.

    Attributes:
        plan: None where nothing can be, because it needs more than the architecture of an earlier stage.
        model: what it was planned from.
        notes: what the plan does not say.
    """

    stage: Stage
    plan: Plan | None
    model: str
    notes: tuple[str, ...]


def plan_stages(recipe: StagedRecipe, progress: Progress = silent, plan: PlanJob = estimate_job) -> list[StagePlan]:
    """Plans every stage. One that starts from a stage that is not done is planned from the model that this starts from.

    Args:
        plan: how a stage is planned.

    Raises:
        InputError: for anything wrong with a model, data or settings, naming the stage.
    """
    found = []
    for at, stage in enumerate(recipe.stages):
        job, notes, waits_for = recipe_to_plan(recipe, stage)
        if at and not stage.names_model:
            notes = (f"starts from {stage.recipe.model.path}, not from the stage before it: it names no model", *notes)
        if waits_for:
            told = f"planned when stage {', '.join(waits_for)} is done, which it uses"
            found.append(StagePlan(stage, None, stage.recipe.model.path, (*notes, told)))
            continue
        try:
            planned = plan(job, progress)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error.what}", where=error.where, fix=error.fix) from error
        found.append(StagePlan(stage, planned.plan, stage.recipe.model.path, notes))
    return found


def recipe_to_plan(recipe: StagedRecipe, stage: Stage) -> tuple[Recipe, tuple[str, ...], tuple[str, ...]]:
    """A stage's recipe with a model that is here now.

    Returns:
        The recipe; what must be said of it; and the stages that it uses otherwise than as its model and that are not
        done, without which it cannot be planned.
    """
    by_name = {other.name: other for other in recipe.stages}
    waiting = [name for name in stage.uses if Run(_place(recipe, by_name[name])).result is None]
    job, source = recipe.recipe_of(stage), stage.starts_from
    others = tuple(name for name in waiting if name != source)
    if source not in waiting or others:
        return job, (), others
    root = stage
    while (above := root.starts_from) is not None:
        root = by_name[above]
    spec = root.recipe.model
    model = job.model.model_copy(update={"path": spec.path, "revision": spec.revision})
    note = f"stage {source} is not trained yet: planned from {spec.path}, which it comes from"
    return job.model_copy(update={"model": model}), (note,), ()


def finetune_stages(
    recipe: StagedRecipe,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    forced: Sequence[str] = (),
    announce: Announce = lambda number, stage: None,
) -> Chain:
    """Runs every stage, each into a directory of its own below `recipe.output`.

    It ends before the next stage when the gate of one says no: what would start from that result was not asked for.

    Args:
        resume: go on with the stage that is not done; done ones stay as they are.
        forced: keys that may differ from what the chain was begun with, for all stages (`train.steps`) or one
            (`stages.sft.train.steps`).

    Raises:
        InputError: the recipe, data or a model is wrong; nothing is left behind by a chain that had not begun.
        TrainingError, Interrupted: as `finetune`; the chain can be resumed.
    """
    watcher = watcher or Watcher()
    path = Path(recipe.output)
    begun = _begun(path, resume)
    if is_main():
        if begun:
            _refuse_another_recipe(path, recipe, forced)
        else:
            # What is wrong with the last stage is told before the first one has trained for hours.
            plan_stages(recipe, watcher.progress, plan_job)
            Chain.create(recipe)
    joined = join_processes(detect_hardware().device)  # once for all stages
    try:
        for number, stage in enumerate(recipe.stages, 1):
            announce(number, stage)
            run = finetune(
                recipe.recipe_of(stage),
                resume=resume,
                watcher=watcher,
                forced=_forced_in(stage, recipe, forced),
            )
            if is_main():
                Chain.open(path).write_report()
            wait_for_all()
            if gate_said_no(run):
                break
    except BaseException:
        if not begun and is_main() and not any(one.begun for one in Chain.open(path).stages):
            remove_directory(path)
        raise
    finally:
        if joined:
            leave_processes()
    return Chain.open(path)


def _place(recipe: StagedRecipe, stage: Stage) -> Path:
    return Path(recipe.output) / stage.directory


def _begun(path: Path, resume: bool) -> bool:
    """Whether there is a chain to go on with.

    Raises:
        InputError: when the directory is occupied by anything else, or by a chain and it is not to be resumed.
    """
    if resume and (path / CHAIN).is_file():
        return True
    if resume and (path / RECIPE).is_file():
        raise InputError(
            "this directory holds a run of one job, and the recipe has stages",
            where=path,
            fix="name another one: output=runs/NAME",
        )
    if is_main():
        Run.refuse_occupied(path)
    return False


def _refuse_another_recipe(path: Path, recipe: StagedRecipe, forced: Sequence[str]) -> None:
    """Takes over changes that were forced, and raises InputError for others and for those that come too late."""
    chain = Chain.open(path)
    was, now = [stage.name for stage in chain.stages], [stage.name for stage in recipe.stages]
    if was != now:
        raise InputError(
            f"the stages are {', '.join(now)} now and were {', '.join(was)} when the first one began",
            where=path / RECIPE,
            fix="resume with the chain's own recipe, or start a new one: output=runs/NAME",
        )
    changed = changed_between(path / RECIPE, recipe.yaml())
    everywhere = [f"stages.{name}.{key}" for name in now for key in forced if not key.startswith("stages.")]
    refuse_changes(path / RECIPE, changed, [*forced, *everywhere])
    for stage, there in zip(recipe.stages, chain.stages, strict=True):
        late = changed_keys(there.run, recipe.recipe_of(stage)) if there.begun and there.run.report is not None else {}
        for key in late:
            raise InputError(
                f"stage {stage.name} is done, and its {key} can no longer change",
                where=there.run.path,
                fix="force it in one stage, --force stages.NAME.KEY=…, or start a new chain: output=runs/NAME",
            )
    if changed:
        write_text(path / RECIPE, recipe.yaml())


def _forced_in(stage: Stage, recipe: StagedRecipe, forced: Sequence[str]) -> tuple[str, ...]:
    """The keys of a stage that were changed by force, as its own recipe names them."""
    run = Run(_place(recipe, stage))
    if not forced or not (run.path / RECIPE).is_file():
        return ()
    own = f"stages.{stage.name}."
    named = [key.removeprefix(own) for key in forced if key.startswith(own) or not key.startswith("stages.")]
    changed = changed_keys(run, recipe.recipe_of(stage))
    return tuple(key for key in named if any(one == key or one.startswith(f"{key}.") for one in changed))


def plans_json(plans: Sequence[StagePlan]) -> str:
    """All plans as JSON, for programs."""
    stages = [
        {
            "name": item.stage.name,
            "model": item.model,
            "notes": list(item.notes),
            "plan": None if item.plan is None else item.plan.model_dump(mode="json"),
        }
        for item in plans
    ]
    return json.dumps({"stages": stages}, indent=2)
