"""What is minimised: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.objectives.objective import TrainingObjective
from tunesmith.objectives.supervised import Supervised

# A discriminated union needs two members; the annotation keeps the one place where new objectives join.
Objective = Annotated[Supervised, Field()]

__all__ = ["Objective", "Supervised", "TrainingObjective"]
