"""What any adapter in a model allows, whoever's layers it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tunesmith.base import InputError
from tunesmith.methods.bottleneck import bottlenecks, without_bottlenecks
from tunesmith.methods.low_rank import merge_lora, without_lora
from tunesmith.methods.prompt import prompted, without_prompt
from tunesmith.methods.through_peft import merge_peft, without_peft
from tunesmith.methods.token_rows import merge_rows, without_rows


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Runs the model as its base."""
    with (
        without_lora(model),
        without_rows(model),
        without_peft(model),
        without_bottlenecks(model),
        without_prompt(model),
    ):
        yield


def merge_layers(model: nn.Module) -> int:
    """Folds every layer of an adapter into the weight beside it and puts the plain layer back.

    Returns:
        Number of layers merged.

    Raises:
        InputError: when weights are quantized, or the method cannot be merged.
    """
    what = "a bottleneck adapter" if bottlenecks(model) else "a prompt" if prompted(model) else None
    if what is not None:
        raise InputError(
            f"{what} cannot be merged: there is no weight that it could become a part of",
            where="method.kind",
            fix="use it unmerged, or train with lora",
        )
    return merge_rows(model) + merge_lora(model) + merge_peft(model)
