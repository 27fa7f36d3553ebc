"""What is trainable: one explicit union, one file a family."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.methods.bottleneck import Adapter
from tunesmith.methods.full import Full
from tunesmith.methods.head import HeadOnly
from tunesmith.methods.lora import Lora, QLora
from tunesmith.methods.method import AdaptationMethod, trainable_parameters
from tunesmith.methods.prefix import Prefix
from tunesmith.methods.prompt import Prompt
from tunesmith.methods.through_peft import Ia3, Peft

Method = Annotated[Full | HeadOnly | Lora | QLora | Adapter | Prefix | Prompt | Ia3 | Peft, Field(discriminator="kind")]

__all__ = [
    "AdaptationMethod",
    "Adapter",
    "Full",
    "HeadOnly",
    "Ia3",
    "Lora",
    "Method",
    "Peft",
    "Prefix",
    "Prompt",
    "QLora",
    "trainable_parameters",
]
