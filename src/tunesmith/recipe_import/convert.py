"""From a file of another tool to a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from tunesmith.base import InputError, nearest
from tunesmith.recipe import Recipe
from tunesmith.recipe_import import axolotl, llamafactory
from tunesmith.recipe_import.job import LOUD, Entry, ImportedKey, Job
from tunesmith.recipe_import.keys import Found, read_keys
from tunesmith.recipe_import.trainer_settings import closing

Source = Literal["axolotl", "llamafactory"]

TABLES: dict[Source, tuple[str, tuple[Entry, ...]]] = {
    "axolotl": (axolotl.TOOL, axolotl.TABLE),
    "llamafactory": (llamafactory.TOOL, llamafactory.TABLE),
}
MODEL_KEYS: dict[Source, str] = {"axolotl": "base_model", "llamafactory": "model_name_or_path"}


@dataclass(frozen=True)
class Imported:
    """A file of another tool as a recipe.

    Attributes:
        recipe: trains as the file would, as far as the notes do not say otherwise.
        yaml: the recipe with the keys that differ from Tunesmith's defaults.
        source: the tool that the file is for.
        keys: every key of the file once, in its order, and what became of it.
        defaults: what stands in the recipe because the other tool's default differs, and why.
    """

    recipe: Recipe
    yaml: str
    source: Source
    keys: list[ImportedKey]
    defaults: list[str]

    @property
    def changes(self) -> list[ImportedKey]:
        """The keys because of which the recipe will train differently."""
        return [key for key in self.keys if LOUD in key.note]


def import_recipe(path: str | Path) -> Imported:
    """Reads a file of axolotl or LLaMA-Factory and makes a valid recipe of it.

    Raises:
        InputError: when the file is malformed, is for neither tool, names no data, asks for a stage or method that is
            not available, or has a value that does not fit its key; with the file, the line and the key.
    """
    file = Path(path)
    found = read_keys(file)
    source = _detect(found, str(path))
    tool, table = TABLES[source]
    job = Job(found, str(path), file.parent, tool)
    if job.get(MODEL_KEYS[source]) is None:
        job.refuse(MODEL_KEYS[source], f"this key is missing, and the file looks like one of {tool}")
    for entry in table:
        entry.apply(job)
    closing(job)
    keys = job.finish(_known(table))
    recipe = _checked(job)
    changes = [f"{key.line} {key.key}: {key.note}" for key in keys if LOUD in key.note]
    changes += [line for line in job.defaults if LOUD in line]
    head = [f"From {file.name}, a file of {tool}."]
    if changes:
        head += ["It trains differently in what follows; numbers are lines of that file.", *changes]
    return Imported(recipe, _yaml(recipe, head), source, keys, job.defaults)


def migration_table(source: Source) -> str:
    """A tool's keys and what they become, as Markdown."""
    rows = ["| key | in the recipe | how |", "|---|---|---|"]
    for entry in TABLES[source][1]:
        keys = ", ".join(f"`{key}`" for key in entry.keys)
        to = ", ".join(f"`{name.strip()}`" for name in entry.to.split(",")) if entry.to else "–"
        rows.append(f"| {keys} | {to} | {entry.meaning} |")
    return "\n".join(rows) + "\n"


def _known(table: Sequence[Entry]) -> list[str]:
    return [key for entry in table for key in entry.keys]


def _detect(found: dict[str, Found], shown: str) -> Source:
    """The tool of which the file has more keys that the other one does not know."""
    known: dict[Source, set[str]] = {source: set(_known(table)) for source, (_, table) in TABLES.items()}
    names = [key for key in found if "." not in key]
    counts: dict[Source, int] = {"axolotl": 0, "llamafactory": 0}
    for source in TABLES:
        own = known[source].difference(*(keys for other, keys in known.items() if other != source))
        counts[source] = sum(key in own for key in names) + 10 * (MODEL_KEYS[source] in names)
    if counts["axolotl"] != counts["llamafactory"]:
        return max(counts, key=lambda source: counts[source])
    if {"model", "data"} <= set(names):
        raise InputError("this is a recipe already", where=shown, fix="run it as it is")
    everything = sorted(known["axolotl"] | known["llamafactory"])
    hints = [f"{key}{nearest(key, everything)}" for key in names if nearest(key, everything)][:3]
    raise InputError(
        "this is a file of neither axolotl nor LLaMA-Factory" + (f" ({'; '.join(hints)})" if hints else ""),
        where=shown,
        fix="axolotl's files have base_model and datasets, LLaMA-Factory's have model_name_or_path and dataset",
    )


def _checked(job: Job) -> Recipe:
    values: dict[str, Any] = {}
    for dotted, value in job.recipe.items():
        place = values
        *parents, leaf = dotted.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        fitting = [to for to in job.origin if all(part in location for part in to.split("."))]
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        what = f"{message[0].lower()}{message[1:]}, found {first['input']!r:.60}"
        if fitting:
            job.refuse(job.origin[max(fitting, key=len)], what)
        raise InputError(what, where=f"{job.shown} {'.'.join(location)}") from error


def _yaml(recipe: Recipe, head: Sequence[str]) -> str:
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    if set(values["model"]) == {"path"}:
        values["model"] = values["model"]["path"]
    for section in ("method", "objective"):
        values[section] = {"kind": getattr(recipe, section).kind, **values.get(section, {})}
    ordered = {key: values[key] for key in Recipe.model_fields if key in values}
    # A key may hold a line break, and a comment may not.
    comment = "".join(f"# {' '.join(line.replace(LOUD, '').split())}\n" for line in head)
    return comment + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120)
