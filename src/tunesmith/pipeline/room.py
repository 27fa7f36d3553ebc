"""Whether a job's files fit on the disk, before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.recipe import Plan, Recipe

REST_BYTES = 16 * 2**20
"""Tokenizer, evaluations, events and report."""


def needed_bytes(plan: Plan, recipe: Recipe) -> int:
    """What a run's directory takes: its checkpoints, one more while it is written, the result, and small files."""
    trained = 4 * plan.parameters.trainable
    result = trained if recipe.method.kind == "lora" else 4 * plan.parameters.total
    checkpoint = trained + plan.memory.optimizer
    kept = recipe.train.keep + 1 + (recipe.data.validation is not None)
    return kept * checkpoint + result + REST_BYTES


def refuse_too_little_room(path: Path, plan: Plan, recipe: Recipe) -> None:
    """Raises InputError when the disk has less room than the run needs."""
    place = next(place for place in path.absolute().parents if place.exists())
    needed, free = needed_bytes(plan, recipe), shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"the run needs about {needed / 1e6:,.0f} MB on disk and there are {free / 1e6:,.0f} MB",
            where=path,
            fix="make room, lower train.keep, or name a directory on another disk: output=…",
        )
