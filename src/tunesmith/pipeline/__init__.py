"""The whole job, from a recipe to a proven result."""

from __future__ import annotations

from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.loaded import batches, evaluate, load
from tunesmith.pipeline.merging import merge_run

__all__ = ["Watcher", "batches", "evaluate", "finetune", "load", "merge_run"]
