"""Feature extraction: the trunk stays as it is, and only a head on what it makes of a row is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.low_rank import names_of, untie
from tunesmith.methods.method import AdaptationMethod, freeze, train_in_fp32, train_task_head, trainable_parameters
from tunesmith.methods.targets import output_head_name
from tunesmith.models.task_head import head_modules


class HeadOnly(AdaptationMethod):
    """The head alone is trained; what it reads is computed once and kept on disk.

    Of a model that writes, the head is its output layer, which becomes a copy of its own where it is tied.
    """

    kind: Literal["head"] = "head"
    """Train a head on the frozen model's features (a probe: Alain & Bengio 2017)."""
    solver: Literal["auto", "gradient"] = "auto"
    """`auto` closes with scikit-learn's exact solver where the loss of the head is convex and its layer is plain:
    logistic regression for labels of rows and words, ridge regression for numbers, at the strength of the penalty that
    does best on rows held back from training; the result of gradient steps stays where that is better on them."""

    saved_as: ClassVar[str] = "model"
    default_learning_rate: ClassVar[float] = 1e-3
    trunk_is_frozen: ClassVar[bool] = True

    @property
    def needs_autocast(self) -> bool:
        return True

    def adapt(self, model: nn.Module) -> list[str]:
        freeze(model)
        if head_modules(model):
            train_task_head(model)
            return []
        name = output_head_name(model)
        if name is None:
            raise InputError("this model has no output layer", where="method.kind", fix="use full or lora")
        layer = cast(Any, model).get_submodule(name)
        if len(names_of(model, layer.weight)) > 1:
            untie(model, f"{name}.weight")
        train_in_fp32(model, layer.parameters())
        return []

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        cast(Any, model).save_pretrained(directory, safe_serialization=True)

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(trainable_parameters(model))
