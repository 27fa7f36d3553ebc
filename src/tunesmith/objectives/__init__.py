"""What is minimised: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.objective import AroundObjective, StepObjective, TargetLogps, TrainingObjective
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.supervised import NextToken, Supervised
from tunesmith.objectives.task import Classify, Regress, Tag, TaskObjective

Objective = Annotated[Supervised | Pretrain | Classify | Tag | Regress, Field(discriminator="kind")]

__all__ = [
    "AroundObjective",
    "Classify",
    "NextToken",
    "Objective",
    "Pretrain",
    "Regress",
    "StepObjective",
    "Supervised",
    "Tag",
    "TargetLogps",
    "TaskObjective",
    "TrainingObjective",
]
