"""Recipes with `stages:`: several jobs one after the other, each laid over the keys that stand above them.

A text `stages.NAME` in a stage stands for the result of an earlier one, in `model` and wherever else a model is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import (
    check_recipe,
    named_after,
    place_of,
    plain_yaml,
    read_recipe,
    read_values,
)
from tunesmith.recipe_overrides import SHORT_FORMS

STAGES = "stages"
NAME = re.compile("[a-z0-9][a-z0-9-]*")
REFERENCE = re.compile(r"stages\.([\w-]+)")
NO_REFERENCES_IN = ("data",)
"""Sections whose texts are no names of models: a file of rows may be called `stages.jsonl`."""


@dataclass(frozen=True)
class Stage:
    """One job of several.

    Attributes:
        name: in the recipe.
        directory: of its run, below the whole job's, such as `stages/01-sft`.
        recipe: the whole of it; `stages.NAME` still stands where an earlier result is meant.
        uses: earlier stages that it names, in their order.
        names_model: whether the stage says itself which model it starts from.
    """

    name: str
    directory: str
    recipe: Recipe
    uses: tuple[str, ...]
    names_model: bool

    @property
    def starts_from(self) -> str | None:
        """The stage whose result this one's model is."""
        found = REFERENCE.fullmatch(self.recipe.model.path)
        return found[1] if found is not None else None


@dataclass(frozen=True)
class StagedRecipe:
    """A recipe with stages, in the order in which they run.

    Attributes:
        output: directory of the whole job.
    """

    output: str
    stages: tuple[Stage, ...]

    def recipe_of(self, stage: Stage, places: Mapping[str, str] | None = None) -> Recipe:
        """A stage's recipe as its run has it: with paths for the stages that it names.

        Args:
            places: by name what stands for a stage; else the directory of its run.
        """
        if places is None:
            places = {other.name: str(Path(self.output) / other.directory) for other in self.stages}
        values = stage.recipe.model_dump(mode="json")
        resolved = {
            key: value if key in NO_REFERENCES_IN else _with_places(value, places) for key, value in values.items()
        }
        resolved["output"] = str(Path(self.output) / stage.directory)
        return check_recipe(resolved, f"stage {stage.name}")

    def yaml(self) -> str:
        """The whole recipe with every setting written out, as it is stored; it can be read and run again."""
        stages = {stage.name: stage.recipe.model_dump(mode="json", exclude={"output"}) for stage in self.stages}
        return plain_yaml({STAGES: stages, "output": self.output})


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | StagedRecipe:
    """Reads a recipe of one job or of several, with ``key=value`` overrides.

    Raises:
        InputError: naming the file, the line and the key, and the nearest valid one.
    """
    values, lines = read_values(path, overrides)
    if STAGES not in values:
        return read_recipe(path, overrides)
    return staged_recipe(values, path, lines)


def staged_recipe(values: dict[str, Any], path: str | Path, lines: dict[str, int]) -> StagedRecipe:
    """Checks every stage of plain values.

    Raises:
        InputError: as `read_job`.
    """
    shown, given = str(path), values[STAGES]
    if not isinstance(given, dict) or not given:
        raise InputError(
            "stages are a mapping of names to settings",
            where=place_of(STAGES, shown, lines),
            fix="for example stages: {sft: {…}, dpo: {model: stages.sft, …}}",
        )
    defaults = {key: value for key, value in values.items() if key != STAGES}
    stages: list[Stage] = []
    output = ""
    for number, (name, own) in enumerate(given.items(), 1):
        key = f"{STAGES}.{name}"
        own = {} if own is None else own
        _refuse_odd_stage(str(name), own, place_of(key, shown, lines))
        merged, at = _laid_over(defaults, own), _lines_of_stage(key, lines)
        try:
            recipe = check_recipe(merged, shown, at)
            uses = _uses(str(name), recipe, [str(other) for other in given], shown, at)
        except InputError as error:
            raise InputError(f"stage {name}: {error.what}", where=error.where, fix=error.fix) from error
        output = output or named_after(recipe.output, path)
        recipe = recipe.model_copy(update={"output": output})
        names_model = SHORT_FORMS["model"] in _written_out("model", own.get("model"))
        stages.append(Stage(str(name), f"{STAGES}/{number:02d}-{name}", recipe, uses, names_model))
    return StagedRecipe(output, tuple(stages))


def _refuse_odd_stage(name: str, own: Any, where: str) -> None:
    if NAME.fullmatch(name) is None:
        raise InputError(
            f"{name!r} is no name for a stage, which is a directory's too",
            where=where,
            fix="use small letters, digits and hyphens",
        )
    if not isinstance(own, dict):
        raise InputError(f"stage {name}: should be settings, one `key: value` a line", where=where)
    for key in (STAGES, "output"):
        if key in own:
            raise InputError(
                f"stage {name}: {key!r} stands at the top level only",
                where=where,
                fix="move it there; each stage has a directory of its own below output" if key == "output" else None,
            )


def _laid_over(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A stage's sections over the recipe's, key by key; one that says which model or kind it is replaces the other."""
    merged = dict(defaults)
    for section, value in own.items():
        upper, lower = _written_out(section, value), _written_out(section, merged.get(section))
        says_which = SHORT_FORMS.get(section) in upper
        if not isinstance(value, dict) or says_which or section == "gate":
            merged[section] = value
        else:
            merged[section] = {**lower, **upper}
    return merged


def _written_out(section: str, value: Any) -> dict[Any, Any]:
    """A section as a mapping, also where it is written short; what is none of both is as good as empty."""
    if isinstance(value, str) and section in SHORT_FORMS:
        return {SHORT_FORMS[section]: value}
    return value if isinstance(value, dict) else {}


def _lines_of_stage(key: str, lines: dict[str, int]) -> dict[str, int]:
    """The line of every key of a stage, its own or those above; of what stands nowhere the line of the stage."""
    above = {name: line for name, line in lines.items() if name.partition(".")[0] != STAGES}
    own = {name.removeprefix(f"{key}."): line for name, line in lines.items() if name.startswith(f"{key}.")}
    return {"": lines[key], **above, **own}


def _uses(name: str, recipe: Recipe, order: list[str], shown: str, lines: dict[str, int]) -> tuple[str, ...]:
    """The stages that a stage names, which must come before it."""
    earlier, found = order[: order.index(name)], set[str]()
    for key, used in _references(recipe.model_dump(mode="json")):
        where = place_of(key, shown, lines)
        if used not in order:
            raise InputError(
                f"there is no stage {used!r}{nearest(used, order)}", where=where, fix=f"stages: {', '.join(order)}"
            )
        if used == name:
            raise InputError(
                "a stage cannot start from its own result", where=where, fix="name a model, or an earlier stage"
            )
        if used not in earlier:
            raise InputError(
                f"stage {used!r} comes later", where=where, fix=f"a stage can use those above it only: move {used} up"
            )
        found.add(used)
    return tuple(other for other in earlier if other in found)


def _references(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and name of every text that stands for a stage."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, str) and (match := REFERENCE.fullmatch(value)) is not None:
            yield key, match[1]
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for inner, one in items:
            yield from walk(one, f"{key}.{inner}")

    for section, value in values.items():
        if section not in NO_REFERENCES_IN:
            yield from walk(value, section)


def _with_places(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str) and (match := REFERENCE.fullmatch(value)) is not None:
        return places.get(match[1], value)
    if isinstance(value, dict):
        return {key: _with_places(inner, places) for key, inner in value.items()}
    return [_with_places(inner, places) for inner in value] if isinstance(value, list) else value
