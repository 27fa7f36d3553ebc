"""`tunesmith rerun`: a run's recipe again on a new base or new data, and the two runs compared."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import compare_metrics, judgement
from tunesmith.evaluation.several import without_unlike_tokens
from tunesmith.pipeline.chain import Chain
from tunesmith.pipeline.comparing import OPENINGS, VERDICTS, rows_by_key
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.lineage import repeated_runs, write_manifest
from tunesmith.pipeline.locating import run_recipe
from tunesmith.pipeline.resuming import changed_keys
from tunesmith.recipe import EvaluateSpec, Recipe
from tunesmith.recipe_file import read_recipe
from tunesmith.run import PLAN, RECIPE, TUNED_EVALUATION, Run
from tunesmith.train.parallel import is_main

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Again:
    """A recipe that is about to be run again.

    Attributes:
        old: the run that it comes from.
        recipe: with the changes and the new run's directory.
        resume: whether that directory holds an interrupted rerun, which is gone on with.
    """

    old: Run
    recipe: Recipe
    resume: bool


def plan_rerun(path: str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> Again:
    """Reads the recipe of a run and applies ``key=value`` changes.

    Without an `output=` the new run's directory is the first free one of RUN-2, RUN-3 …; with ``resume`` it is the last
    of those in which a rerun was begun and not ended, and its own recipe goes on, so that no change need be repeated.

    Raises:
        InputError: when there is no run, nothing to resume, or a change is wrong.
    """
    if Chain.is_here(Path(path)):
        raise InputError(
            "this holds several runs, one for each stage of a recipe",
            where=path,
            fix=f"name one of {Path(path) / 'stages'}, or train {Path(path) / RECIPE} with output=runs/NAME",
        )
    old = Run.open(path)
    if old.path.name in ("", ".."):
        old = Run(old.path.resolve())
    recipe = read_recipe(old.path / RECIPE, overrides)
    is_named = any(override.partition("=")[0].strip() == "output" for override in overrides)
    if resume:
        output = Path(recipe.output) if is_named else _interrupted(old)
        begun = Run.to_resume(output)
        recipe = recipe if begun is None else read_recipe(begun.path / RECIPE, overrides)
    else:
        output = recipe.output if is_named else _free_directory(old)
    return Again(old, recipe.model_copy(update={"output": str(output)}), resume)


def rerun(again: Again, watcher: Watcher | None = None) -> tuple[Run, dict[str, Any] | None]:
    """Does the whole job of `finetune` again, compares the new run with the old one and stores that as
    `comparison.json`.

    Returns:
        The new run, and the comparison; None instead of it in processes that do not write.

    Raises:
        InputError, TrainingError, Interrupted: as `finetune` does.
    """
    run = finetune(again.recipe, resume=again.resume, watcher=watcher, parent=again.old.path)
    if not is_main():
        return run, None
    comparison = compare_runs(again.old, run)
    run.write(COMPARISON, comparison)
    write_manifest(run)
    return run, comparison


def compare_runs(old: Run, new: Run) -> dict[str, Any]:
    """What changed between two runs' recipes, and what that did to the result.

    Where both judged the same held-out rows, the new run's answers are compared with the old one's by a paired
    bootstrap; else both results stand side by side, and it is said why they are not compared.

    Returns:
        `old` and `new` (directories), `changed` (by setting its old and new value), `same_rows`, `reason` when they
        are not the same, `verdict` (`better`, `worse`, `no_difference`, or None), `sentence`, `metrics` (`old`, `new`,
        `difference`, interval `low` and `high`, `better`, `n`), `results` (each run's own) and `warnings`.
    """
    recipe = run_recipe(new)
    found: dict[str, Any] = {
        "old": str(old.path),
        "new": str(new.path),
        "changed": changed_keys(old, recipe),
        "same_rows": False,
        "reason": None,
        "verdict": None,
        "sentence": "",
        "metrics": [],
        "results": {"old": _own_result(old), "new": _own_result(new)},
        "warnings": [],
    }
    pairs = _same_rows(old, new)
    if isinstance(pairs, str):
        sentence = f"Not compared with {old.path}: {pairs}. The two results stand side by side."
        return {**found, "reason": pairs, "sentence": sentence}
    assert recipe.evaluate != "off"
    return {
        **found,
        "same_rows": True,
        **_compared(old, pairs, new.read(PLAN)["metrics"], recipe.evaluate, recipe.seed),
    }


Pairs = list[tuple[Judged, Judged]]


def _same_rows(old: Run, new: Run) -> Pairs | str:
    """Both runs' answers to the same held-out rows, in the new run's order; or why there are none."""
    for run in (old, new):
        if run.report is None:
            return f"{run.path} is not finished"
    before, after = (
        rows_by_key(run, [Judged(**row) for row in run.read(TUNED_EVALUATION)["rows"]]) for run in (old, new)
    )
    if not before or not after:
        return "evaluation was switched off"
    if before.keys() != after.keys():
        return f"they were judged on different rows ({len(before)} and {len(after)})"
    return [(before[key], row) for key, row in after.items()]


def _compared(old: Run, pairs: Pairs, names: list[str], spec: EvaluateSpec, seed: int) -> dict[str, Any]:
    base, tuned = [before for before, _ in pairs], [after for _, after in pairs]
    names, left_out = without_unlike_tokens(names, [base], [tuned])
    warnings = [] if left_out is None else [left_out]
    entries, more = compare_metrics(names, base, tuned, spec, seed)
    verdict = VERDICTS[judgement(entries, {"status": "off"}, {}).verdict] if entries else None
    return {
        "verdict": verdict,
        "sentence": _sentence(verdict, old, entries),
        "metrics": [_between_runs(entry) for entry in entries],
        "warnings": warnings + more,
    }


def _between_runs(entry: dict[str, Any]) -> dict[str, Any]:
    names = {"base": "old", "tuned": "new"}
    return {names.get(name, name): value for name, value in entry.items()}


def _sentence(verdict: str | None, old: Run, entries: list[dict[str, Any]]) -> str:
    if verdict is None:
        return f"Not compared with {old.path}: no metric could be measured on both."
    first = entries[0]
    span = "" if first["low"] is None else f", interval {first['low']:+.3g} to {first['high']:+.3g}"
    return (
        f"{OPENINGS[verdict]} {old.path}: {first['name']} went from {first['base']:.4g} to {first['tuned']:.4g} "
        f"(difference {first['difference']:+.3g}{span}, {first['n']} held-out rows)."
    )


def _own_result(run: Run) -> dict[str, Any] | None:
    report = run.report
    return None if report is None else {name: report[name] for name in ("verdict", "sentence", "metrics")}


def _free_directory(old: Run) -> Path:
    stem = _stem(old)
    number = 2
    while (directory := old.path.with_name(f"{stem}-{number}")).exists():
        number += 1
    return directory


def _interrupted(old: Run) -> Path:
    """The last rerun of a run that was begun and has no comparison yet."""
    stem = _stem(old)
    begun = []
    for path in old.path.parent.glob("*"):
        match = re.fullmatch(re.escape(stem) + r"-(\d+)", path.name)
        if match and (path / RECIPE).is_file() and not (path / COMPARISON).is_file() and _repeats(Run(path), old):
            begun.append((int(match[1]), old.path.with_name(path.name)))
    if not begun:
        raise InputError(
            "no rerun of this run was interrupted",
            where=old.path,
            fix="leave out --resume, or name the rerun's directory: output=runs/NAME",
        )
    return max(begun)[1]


def _stem(old: Run) -> str:
    """The name that a number is put behind; a rerun of RUN-2 is RUN-3, not RUN-2-2."""
    match = re.fullmatch(r"(.+)-\d+", old.path.name)
    return match[1] if match and repeated_runs(old) else old.path.name


def _repeats(run: Run, old: Run) -> bool:
    return Path(os.path.abspath(old.path)) in repeated_runs(run)
