"""One job with several seeds: a run each, and one verdict over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import compare_forgetting, judgement
from tunesmith.evaluation.several import compare_systems
from tunesmith.files import new_directory, read_json, write_json, write_text
from tunesmith.pages.report import report_page
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.locating import run_recipe
from tunesmith.pipeline.memorisation import with_remark
from tunesmith.recipe import Recipe
from tunesmith.run import BASE_EVALUATION, PAGE, PLAN, RECIPE, REPORT, RESTORE, SEEDS, TUNED_EVALUATION, Run
from tunesmith.train.parallel import is_main, wait_for_all

Announce = Callable[[int, int, Recipe], None]
"""Told before each seed: its number from 1, how many there are, and its recipe."""


@dataclass(frozen=True)
class Seeds:
    """A directory of runs that differ in their seed alone, and the report over all of them."""

    path: Path
    runs: tuple[Run, ...]

    @staticmethod
    def is_here(path: Path) -> bool:
        return (path / SEEDS).is_file()

    @staticmethod
    def open(path: Path) -> Seeds:
        """Opens an existing directory. Raises InputError when its file is damaged."""
        try:
            return Seeds(path, tuple(Run(path / str(name)) for name in read_json(path / SEEDS)["runs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("damaged: it does not list runs", where=path / SEEDS, fix=RESTORE) from error

    @property
    def report(self) -> dict[str, Any] | None:
        return Run(self.path).report

    def summary(self) -> dict[str, Any]:
        """One line about all seeds, for lists, with the keys that a run has."""
        own = [run.summary() for run in self.runs if (run.path / PLAN).is_file()]
        done = sum(one["state"] == "done" for one in own)
        state = next((one["state"] for one in own if one["state"] != "done"), "unfinished")
        return {
            "run": str(self.path),
            "state": "done" if self.report is not None else f"{state}, {done} of {len(self.runs)} seeds",
            "steps": sum(one["steps"] for one in own),
            "model": own[0]["model"] if own else None,
            "method": own[0]["method"] if own else None,
            "verdict": (self.report or {}).get("verdict"),
        }

    @property
    def page(self) -> Path:
        return self.path / PAGE


def finetune_seeds(
    recipe: Recipe,
    count: int,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    announce: Announce = lambda number, of, recipe: None,
) -> Seeds:
    """Does the whole job once for each seed, from the recipe's own upwards, and judges them together.

    What is held out is drawn with the recipe's own seed for all, so that they are judged on the same rows.

    Raises:
        InputError: when the directory is occupied, or holds another number of seeds; and as `finetune`.
        TrainingError, Interrupted: as `finetune`; finished seeds are kept, and `resume` goes on.
    """
    path = Path(recipe.output.replace("{name}", "run"))
    names = [f"seed-{recipe.seed + at}" for at in range(count)]
    seeds = _opened(path, names, resume)
    split = recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed
    data = recipe.data.model_copy(update={"split_seed": split})
    for at, run in enumerate(seeds.runs):
        own = recipe.model_copy(update={"seed": recipe.seed + at, "output": str(run.path), "data": data})
        announce(at + 1, count, own)
        finetune(own, resume=resume, watcher=watcher)
    if is_main():
        report = seeds_report(seeds)
        write_text(seeds.page, report_page(report))
        write_json(path / REPORT, report)
    wait_for_all()
    return seeds


def _opened(path: Path, names: list[str], resume: bool) -> Seeds:
    if resume and Seeds.is_here(path):
        seeds = Seeds.open(path)
        if (found := [run.path.name for run in seeds.runs]) != names:
            raise InputError(
                f"this holds {', '.join(found)}, and {', '.join(names)} are asked for",
                where=path,
                fix=f"resume with --seeds {len(found)}, or name another directory: output=runs/NAME",
            )
        return seeds
    Run.refuse_occupied(path)
    if is_main():
        with new_directory(path) as directory:
            write_json(directory / SEEDS, {"runs": names})
    wait_for_all()
    return Seeds(path, tuple(Run(path / name) for name in names))


def seeds_report(seeds: Seeds) -> dict[str, Any]:
    """The report over all seeds: metrics are means, intervals cover rows and seeds, the rest is the first seed's."""
    reports = [run.report for run in seeds.runs]
    if any(report is None for report in reports):
        raise InputError("not every seed is finished", where=seeds.path, fix="finish them with --resume")
    every = [report for report in reports if report is not None]
    first, recipe = every[0], run_recipe(seeds.runs[0])
    results = [
        {
            "seed": run_recipe(run).seed,
            "run": run.path.name,
            "verdict": report["verdict"],
            "values": {entry["name"]: entry["tuned"] for entry in report["metrics"]},
        }
        for run, report in zip(seeds.runs, every, strict=True)
    ]
    told = f"samples, curves, memory and time are those of {seeds.runs[0].path.name}"
    common = {
        **first,
        "name": seeds.path.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": results,
        "tasks": [],
        "preference": None,
        "confusion": None,
        "command": f"tunesmith train {seeds.runs[0].path / RECIPE} --seeds {len(every)} output={seeds.path}-again",
    }
    if recipe.evaluate == "off":
        return {**common, "warnings": [*first["warnings"], told]}
    base = [[Judged(**row) for row in seeds.runs[0].read(BASE_EVALUATION)["rows"]]]
    stored = [run.read(TUNED_EVALUATION) for run in seeds.runs]
    tuned = [[Judged(**row) for row in one["rows"]] for one in stored]
    metrics, warnings = compare_systems(seeds.runs[0].read(PLAN)["metrics"], base, tuned, recipe.evaluate, recipe.seed)
    forgetting = _mean_forgetting(seeds, stored, first["forgetting"], recipe)
    decided = judgement(metrics, forgetting, recipe.gate)
    for entry in metrics:
        values = [result["values"][entry["name"]] for result in results if entry["name"] in result["values"]]
        if entry["primary"] and len(values) > 1:
            told_spread = f"standard deviation of {entry['name']} over {len(values)} seeds: {_sd(values):.3g}"
            warnings.insert(0, told_spread)
    if len(every) < 3:
        warnings.append("two seeds say little about how far a third would fall from them")
    memorisation = next(
        (one["memorisation"] for one in every if one["memorisation"]["warnings"]), first["memorisation"]
    )
    warnings += memorisation["warnings"]
    shared = [text for text in first["warnings"] if all(text in report["warnings"] for report in every)]
    return {
        **common,
        "verdict": decided.verdict,
        "sentence": with_remark(
            decided.sentence.replace(" held-out rows", f" held-out rows and {len(every)} seeds"), memorisation
        ),
        "memorisation": memorisation,
        "gate": decided.gate,
        "metrics": metrics,
        "forgetting": forgetting,
        "warnings": list(dict.fromkeys([*warnings, told, *shared])),
    }


def _sd(values: list[float]) -> float:
    return float(np.std(values, ddof=1))


def _mean_forgetting(
    seeds: Seeds, stored: list[dict[str, Any]], first: dict[str, Any], recipe: Recipe
) -> dict[str, Any]:
    """Perplexity on general text of the seed that rose the most: a gate must hold for every seed."""
    if first["status"] != "measured" or recipe.evaluate == "off":
        return first
    base = seeds.runs[0].read(BASE_EVALUATION)["general"]
    found = [compare_forgetting(first["source"], base, one["general"], recipe.evaluate, recipe.seed) for one in stored]
    failed = next((one for one in found if one["status"] != "measured"), None)
    if failed is not None:
        return failed
    worst = max(range(len(found)), key=lambda at: found[at]["change"])
    return {**found[worst], "reason": f"This is {seeds.runs[worst].path.name}, where it rose the most."}
