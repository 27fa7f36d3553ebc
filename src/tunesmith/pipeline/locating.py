"""What a name stands for: a model, an adapter over one, a run, or a chain of runs; and what a run started from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tunesmith.base import InputError, Progress, nearest, silent
from tunesmith.files import file_sha256
from tunesmith.methods.method import read_adapter_config
from tunesmith.models.load import locate_model
from tunesmith.models.task_head import TaskHead, saved_head
from tunesmith.pipeline.chain import Chain
from tunesmith.pipeline.lineage import parent_directory, read_lineage
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe, parse_yaml
from tunesmith.run import MERGED, PLAN, RECIPE, RESULTS, SEEDS, Run


@dataclass(frozen=True)
class Location:
    """Where the parts of a model stand.

    Attributes:
        base: directory or hub id of the weights.
        adapter: directory of an adapter on top, if any.
        tokenizer: directory or hub id of the tokenizer and template.
        recipe: of the run, when a run was named.
        run: that run.
    """

    base: str
    adapter: Path | None
    tokenizer: str
    recipe: Recipe | None
    run: Run | None = None

    @property
    def head(self) -> TaskHead | None:
        """The head of a model that judges; None for one that writes."""
        directory = self.adapter or Path(self.base)
        return saved_head(directory) if directory.is_dir() else None

    @property
    def revision(self) -> str | None:
        """Of the base, where a run says it."""
        return self.recipe.model.revision if self.recipe is not None and self.adapter is not None else None

    def merged_from(self) -> dict[str, str]:
        """What is said of an adapter beside the model that it was merged into."""
        assert self.adapter is not None
        weights = self.adapter / "adapter_model.safetensors"
        return {"base": self.base, "adapter": str(self.adapter), "adapter_sha256": file_sha256(weights)}


def locate(path: str, progress: Progress = silent) -> Location:
    """Finds out what a name stands for; of a chain it is the result of the last stage.

    Raises:
        InputError: when it is none of a run with a result, an adapter, a model directory or a hub id.
    """
    directory = Path(path).expanduser()
    if Chain.is_here(directory):
        directory = Chain.open(directory).last_stage().path
    if (directory / SEEDS).is_file():
        names = ", ".join(sorted(place.parent.name for place in directory.glob(f"*/{RECIPE}")))
        raise InputError("this holds several runs, one for each seed", where=directory, fix=f"name one of {names}")
    if (directory / RECIPE).is_file():
        run = Run.open(directory)
        result = run.result
        if result is None:
            raise InputError("the run has no trained result yet", where=directory, fix="finish it with --resume")
        recipe = run_recipe(run)
        if result.name == "adapter":
            return Location(base_of_run(run, recipe, progress), result, str(result), recipe, run)
        return Location(str(result), None, str(result), recipe, run)
    if (directory / "adapter_config.json").is_file():
        base = read_adapter_config(directory).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise InputError(
                "the adapter does not say which model it belongs to",
                where=directory,
                fix="set base_model_name_or_path in adapter_config.json",
            )
        own_tokenizer = (directory / "tokenizer_config.json").is_file()
        location = locate_model(base, progress)
        return Location(location, directory, str(directory) if own_tokenizer else location, None)
    _refuse_missing_run(directory, path)
    location = locate_model(path, progress)
    return Location(location, None, location, None)


def _refuse_missing_run(directory: Path, path: str) -> None:
    """Raises InputError where runs stand beside what is named, and it is not there: no hub is asked for that."""
    if directory.exists() or len(directory.parts) < 2 or not directory.parent.is_dir():
        return
    beside = sorted(str(recipe.parent) for recipe in directory.parent.glob(f"*/{RECIPE}"))
    if beside:
        raise InputError(
            f"there is no run here{nearest(str(directory), beside)}", where=path, fix="`tunesmith runs` lists runs"
        )


def run_recipe(run: Run) -> Recipe:
    path = run.path / RECIPE
    values, lines = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return check_recipe(values, str(path), lines)


def base_of_run(run: Run, recipe: Recipe, progress: Progress = silent) -> str:
    """Directory or hub id of the weights that a run started from: those of its recipe's model, and where that is an
    adapter, of the copy of its base that it was merged into.

    Raises:
        InputError: when they are gone.
    """
    named = recipe.model.path
    if not Path(named).expanduser().exists():  # runs that were moved together find each other by relative paths
        parents = (read_lineage(run) or {"parents": []})["parents"]
        found = [parent_directory(run, parent) for parent in parents if parent["how"] == "base"]
        named = next((str(directory) for directory in found if directory.is_dir()), named)
    start = locate(named, progress)
    if start.adapter is None:
        return start.base
    merged = merged_directory(start.adapter, run.read(PLAN)["frozen_dtype"])
    if not (merged / "config.json").is_file():
        raise InputError(
            f"what {run.path} started from is gone: the base with the adapter of {named} merged into it",
            where=merged,
            fix="restore it from a copy, or train the run again",
        )
    return str(merged)


def merged_directory(adapter: Path, dtype: str) -> Path:
    """Where an adapter is kept merged into a copy of its base, for everything that starts from it: in its run, or for
    one that lies in none in the adapter's own directory. The path is absolute, because PEFT looks for it.

    Args:
        dtype: of the copy's weights, as a plan names it; models that judge are merged in fp32.
    """
    directory = Path(os.path.abspath(adapter))
    dtype = dtype if saved_head(directory) is None else "fp32"
    home = directory.parent if directory.name in RESULTS and (directory.parent / RECIPE).is_file() else directory
    return home / f"{MERGED}{dtype}"
