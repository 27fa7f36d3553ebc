"""What is minimised: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.distill import Distill
from tunesmith.objectives.kto import Kto
from tunesmith.objectives.objective import AroundObjective, StepObjective, TargetLogps, TrainingObjective
from tunesmith.objectives.policy import Grpo, Policy, Rloo
from tunesmith.objectives.ppo import Ppo
from tunesmith.objectives.preference import Dpo, Orpo, Pairwise, Preference, SimPo
from tunesmith.objectives.pretrain import Pretrain
from tunesmith.objectives.reward import Reward
from tunesmith.objectives.supervised import NextToken, Supervised
from tunesmith.objectives.task import Classify, Regress, Tag, TaskObjective

Objective = Annotated[
    Supervised | Pretrain | Dpo | SimPo | Orpo | Kto | Reward | Grpo | Rloo | Ppo | Distill | Classify | Tag | Regress,
    Field(discriminator="kind"),
]

__all__ = [
    "AroundObjective",
    "Classify",
    "Distill",
    "Dpo",
    "Grpo",
    "Kto",
    "NextToken",
    "Objective",
    "Orpo",
    "Pairwise",
    "Policy",
    "Ppo",
    "Preference",
    "Pretrain",
    "Regress",
    "Reward",
    "Rloo",
    "SimPo",
    "StepObjective",
    "Supervised",
    "Tag",
    "TargetLogps",
    "TaskObjective",
    "TrainingObjective",
]
