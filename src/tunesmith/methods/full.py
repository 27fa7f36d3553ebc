"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.method import AdaptationMethod, make_trainable, trainable_parameters


class Full(AdaptationMethod):
    """Every floating-point weight is trained, held in fp32; lower precision is used for the arithmetic only."""

    kind: Literal["full"] = "full"
    """Train all weights."""

    saved_as: ClassVar[str] = "model"
    default_learning_rate: ClassVar[float] = 2e-5

    def adapt(self, model: nn.Module) -> list[str]:
        if getattr(model, "is_quantized", False):
            raise InputError(
                "quantized weights cannot be trained whole",
                where="model.quantize",
                fix="remove model.quantize, or use method.kind: lora",
            )
        for parameter in model.parameters():
            make_trainable(parameter)
        return []

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        cast(Any, model).save_pretrained(directory, safe_serialization=True)

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(trainable_parameters(model))
