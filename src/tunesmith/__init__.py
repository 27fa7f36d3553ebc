"""Tunesmith decides with evidence whether to fine-tune, adapts a language model, and proves that the result is better.

The whole job is `finetune(recipe)`; the pieces are `load`, a method's `adapt`, `step`, `evaluate` and `merge`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.base import InputError, Interrupted, TrainingError, TunesmithError
    from tunesmith.batch import Batch, Example, pack
    from tunesmith.compose.merge import merge
    from tunesmith.data.spec import DataSpec
    from tunesmith.methods import Full, Lora
    from tunesmith.objectives import Supervised
    from tunesmith.pipeline.finetune import finetune
    from tunesmith.pipeline.loaded import batches, evaluate, load
    from tunesmith.recipe import EvaluateSpec, ModelSpec, Recipe, TrainSpec
    from tunesmith.recipe_file import read_recipe
    from tunesmith.resolved import Plan
    from tunesmith.run import Run
    from tunesmith.train.loop import step

__version__ = "0.1.0"

_HOMES = {
    "tunesmith.base": ("InputError", "Interrupted", "TrainingError", "TunesmithError"),
    "tunesmith.batch": ("Batch", "Example", "pack"),
    "tunesmith.compose.merge": ("merge",),
    "tunesmith.data.spec": ("DataSpec",),
    "tunesmith.methods": ("Full", "Lora"),
    "tunesmith.objectives": ("Supervised",),
    "tunesmith.pipeline.finetune": ("finetune",),
    "tunesmith.pipeline.loaded": ("batches", "evaluate", "load"),
    "tunesmith.recipe": ("EvaluateSpec", "ModelSpec", "Recipe", "TrainSpec"),
    "tunesmith.recipe_file": ("read_recipe",),
    "tunesmith.resolved": ("Plan",),
    "tunesmith.run": ("Run",),
    "tunesmith.train.loop": ("step",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "DataSpec",
    "EvaluateSpec",
    "Example",
    "Full",
    "InputError",
    "Interrupted",
    "Lora",
    "ModelSpec",
    "Plan",
    "Recipe",
    "Run",
    "Supervised",
    "TrainSpec",
    "TrainingError",
    "TunesmithError",
    "batches",
    "evaluate",
    "finetune",
    "load",
    "merge",
    "pack",
    "read_recipe",
    "step",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import tunesmith` alone must stay quick."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
