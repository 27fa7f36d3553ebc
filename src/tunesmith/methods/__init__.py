"""What is trainable: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.methods.full import Full
from tunesmith.methods.lora import Lora
from tunesmith.methods.method import AdaptationMethod, trainable_parameters

Method = Annotated[Full | Lora, Field(discriminator="kind")]

__all__ = ["AdaptationMethod", "Full", "Lora", "Method", "trainable_parameters"]
