"""Whether a job's files fit on the disk, before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.recipe import Recipe
from tunesmith.resolved import Plan

REST_BYTES = 16 * 2**20
"""Tokenizer, evaluations, events and report."""


def needed_bytes(plan: Plan, recipe: Recipe) -> dict[str, int]:
    """What a run's directory takes, by part; one checkpoint more than are kept is there while it is written."""
    trained = 4 * plan.parameters.trainable
    kept = recipe.train.keep + 1 + (recipe.data.validation is not None)
    weights = trained if recipe.train.ema == "off" else 2 * trained
    return {
        f"{kept} checkpoints": kept * (weights + plan.memory.optimizer),
        "the result": trained if recipe.method.saved_as == "adapter" else 4 * plan.parameters.total,
        "tokenizer, evaluations and report": REST_BYTES,
    }


def refuse_too_little_room(path: Path, plan: Plan, recipe: Recipe) -> None:
    """Raises InputError when the disk has less room than the run needs."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    parts, free = needed_bytes(plan, recipe), shutil.disk_usage(place).free
    needed = sum(parts.values())
    if free < needed and os.access(place, os.W_OK):
        said = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in parts.items())
        raise InputError(
            f"the run needs about {needed / 1e6:,.1f} MB ({said}), and the disk of {place} has {free / 1e6:,.2f} MB "
            "left",
            where=path,
            fix="make room, lower train.keep, or name a directory on another disk: output=…",
        )
