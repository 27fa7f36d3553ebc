"""A chain of runs on disk: the recipe of all stages, a run for each, and what they come to together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.files import new_directory, read_json, write_json, write_text
from tunesmith.pages.chain import chain_page
from tunesmith.recipe_stages import StagedRecipe
from tunesmith.run import PAGE, PLAN, RECIPE, REPORT, RESTORE, Run

CHAIN = "chain.json"


@dataclass(frozen=True)
class ChainStage:
    """One run of a chain.

    Attributes:
        run: its directory, which need not be there yet.
        starts_from: the stage whose result it starts from; None for another model.
    """

    name: str
    run: Run
    starts_from: str | None

    @property
    def begun(self) -> bool:
        return (self.run.path / PLAN).is_file()


@dataclass(frozen=True)
class Chain:
    """The directory of several runs that were asked for by one recipe. What state a stage is in, its run alone says."""

    path: Path
    stages: tuple[ChainStage, ...]

    @staticmethod
    def is_here(path: Path) -> bool:
        return (path / CHAIN).is_file()

    @staticmethod
    def create(recipe: StagedRecipe) -> Chain:
        """Makes the directory, whole or not at all.

        Raises:
            InputError: when it is occupied or cannot be written.
        """
        path = Path(recipe.output)
        Run.refuse_occupied(path)
        entries = [
            {"name": stage.name, "run": stage.directory, "starts_from": stage.starts_from} for stage in recipe.stages
        ]
        try:
            with new_directory(path) as directory:
                write_json(directory / CHAIN, {"stages": entries})
                write_text(directory / RECIPE, recipe.yaml())
        except OSError as error:
            raise InputError(
                f"the directory cannot be made: {error.strerror}", where=path, fix="name another one: output=runs/NAME"
            ) from error
        return Chain.open(path)

    @staticmethod
    def open(path: Path) -> Chain:
        """Opens an existing chain. Raises InputError when its file is damaged."""
        try:
            stages = tuple(
                ChainStage(str(entry["name"]), Run(path / str(entry["run"])), entry["starts_from"])
                for entry in read_json(path / CHAIN)["stages"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("damaged: it does not list stages", where=path / CHAIN, fix=RESTORE) from error
        if not stages:
            raise InputError("damaged: it lists no stage", where=path / CHAIN, fix=RESTORE)
        return Chain(path, stages)

    def last_stage(self) -> Run:
        """The run whose result is that of the whole chain.

        Raises:
            InputError: when it is not done.
        """
        last = self.stages[-1]
        if last.run.result is None:
            done = [stage for stage in self.stages if stage.run.result is not None]
            others = f", or name an earlier stage: {done[-1].run.path}" if done else ""
            raise InputError(
                f"the last stage, {last.name}, has no result yet",
                where=self.path,
                fix=f"finish it with --resume{others}",
            )
        return last.run

    def summary(self) -> dict[str, Any]:
        """One line about the chain, for lists, with the keys that a run has."""
        states = [self._told(stage) for stage in self.stages]
        done = sum(one["state"] == "done" for one in states)
        unfinished = next((one["state"] for one in states if one["state"] not in ("done", "waiting")), "unfinished")
        state = "done" if done == len(states) else unfinished
        return {
            "run": str(self.path),
            "state": f"{state}, {done} of {len(states)} stages" if state != "done" else state,
            "steps": sum(one["steps"] for one in states),
            "model": states[0]["model"],
            "method": " → ".join(one["name"] for one in states),
            "verdict": states[-1]["verdict"],
        }

    def report(self) -> dict[str, Any]:
        """What the stages came to.

        Returns:
            `name`; `verdict` and `sentence` of the last stage that has a report (None before there is one); `stopped`,
            the stage whose gate said no, or None; and `stages`, each with `name`, `run` (relative), `state` (`done`,
            `running`, `failed`, `interrupted`, `unfinished`, `waiting`), `starts_from`, `model`, `method`, `objective`,
            `steps`, `verdict`, `sentence`, `gate` and `metrics` as in its own report.
        """
        stages = [self._told(stage) for stage in self.stages]
        judged = [stage for stage in stages if stage["verdict"] is not None]
        return {
            "name": self.path.name,
            "verdict": judged[-1]["verdict"] if judged else None,
            "sentence": judged[-1]["sentence"] if judged else None,
            "stopped": next((stage["name"] for stage in stages if stage["gate"] and stage["verdict"] != "ship"), None),
            "stages": stages,
        }

    def write_report(self) -> dict[str, Any]:
        """Writes `report.json` and `report.html` of what is done so far."""
        report = self.report()
        write_json(self.path / REPORT, report)
        write_text(self.path / PAGE, chain_page(report))
        return report

    def _told(self, stage: ChainStage) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": stage.name,
            "run": stage.run.path.relative_to(self.path).as_posix(),
            "state": "waiting",
            "starts_from": stage.starts_from,
            **dict.fromkeys(("model", "method", "objective", "verdict", "sentence")),
            "steps": 0,
            "gate": [],
            "metrics": [],
        }
        if not stage.begun:
            return found
        summary, report = stage.run.summary(), stage.run.report or {}
        kept = ("objective", "sentence", "gate", "metrics")
        return {
            **found,
            **{name: summary[name] for name in ("state", "steps", "model", "method", "verdict")},
            **{name: report[name] for name in kept if name in report},
        }


def chain_of(run: Run) -> Path | None:
    """Directory of the chain that a run is a stage of."""
    above = Path(os.path.abspath(run.path)).parent.parent
    return above if Chain.is_here(above) else None


def gate_said_no(run: Run) -> bool:
    """Whether a finished run was asked to show something and did not."""
    report = run.report
    return report is not None and bool(report["gate"]) and report["verdict"] != "ship"
