"""A job under way: what is planned, its run and model, and who watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.base import Progress as ShowProgress
from tunesmith.base import silent
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.proof import Proof
from tunesmith.pipeline.stopping import Stopping
from tunesmith.resolved import Plan
from tunesmith.run import Run
from tunesmith.train.loop import Emit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Watcher:
    """Who watches a job: progress of long waits, the plan before it starts, and events as they are recorded."""

    progress: ShowProgress = silent
    event: Emit = lambda event: None
    plan: Callable[[Plan], None] = lambda plan: None


@dataclass(frozen=True)
class Work:
    """One job under way.

    Attributes:
        proof: how base and tuned are judged; None on other processes than the main one, and when nothing is judged.
        forced: keys that were changed by force when the run was resumed.
    """

    planned: Planned
    run: Run
    model: PreTrainedModel
    proof: Proof | None
    watcher: Watcher
    stopping: Stopping
    forced: tuple[str, ...] = field(default=())
