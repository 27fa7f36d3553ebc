"""Finished runs on a tiny model, for tests of what may be done with runs afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import colour_rows, write_jsonl
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run


def recipe_for(model: Path | str, place: Path, output: str = "first", /, **sections: Any) -> Recipe:
    """A recipe on the rows of a directory, which are made when they are not there."""
    for name, count, start in (("rows.jsonl", 48, 0), ("held-out.jsonl", 12, 300)):
        if not (place / name).exists():
            write_jsonl(place / name, colour_rows(count, start))
    values: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(place / "rows.jsonl"), "test": str(place / "held-out.jsonl")},
        "method": "lora",
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32", "checkpoint_every": 1},
        "evaluate": {"max_new_tokens": 4, "resamples": 50, "forgetting": "off"},
        "output": str(place / output),
    }
    for name, value in sections.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value
    return check_recipe(values, "test")


def past_run(model: Path | str, place: Path, output: str = "first", /, **sections: Any) -> Run:
    return finetune(recipe_for(model, place, output, **sections))
