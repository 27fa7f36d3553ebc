"""The value head of a policy: one number for each place, read from the same hidden states as the next token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

NAME = "value_head"


def add_value_head(model: nn.Module) -> nn.Linear:
    """Puts a head beside the model's own; it starts at zero, so that nothing random is learned from first.

    It computes in fp32 whatever the trunk does, and is trained with everything else that is trainable.
    """
    trunk = cast(Any, model)
    width = int(trunk.config.get_text_config().hidden_size)
    head = nn.Linear(width, 1, device=next(model.parameters()).device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(NAME, head)
    return head


def value_head(model: nn.Module) -> nn.Linear | None:
    """The head that `add_value_head` put there."""
    return cast(nn.Linear | None, getattr(model, NAME, None))


def take_value_head(model: nn.Module) -> nn.Linear | None:
    """Takes the head off again: the model is then what it would be without one."""
    head = value_head(model)
    if head is not None:
        delattr(model, NAME)
    return head


def values_at(model: nn.Module, hidden: Tensor) -> Tensor:
    """Values of hidden states ``[n, width]``: fp32 ``[n]``."""
    head = value_head(model)
    if head is None:
        raise ValueError("the model has no value head")
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.float()).squeeze(1)
