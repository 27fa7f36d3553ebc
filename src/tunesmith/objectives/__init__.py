"""What is minimised: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.objective import TargetLogps, TrainingObjective
from tunesmith.objectives.policy import Grpo, Policy, Rloo
from tunesmith.objectives.ppo import Ppo
from tunesmith.objectives.supervised import Supervised
from tunesmith.objectives.task import Classify, Regress, Tag, TaskObjective

Objective = Annotated[Supervised | Classify | Tag | Regress | Grpo | Rloo | Ppo, Field(discriminator="kind")]

__all__ = [
    "Classify",
    "Grpo",
    "Objective",
    "Policy",
    "Ppo",
    "Regress",
    "Rloo",
    "Supervised",
    "Tag",
    "TargetLogps",
    "TaskObjective",
    "TrainingObjective",
]
