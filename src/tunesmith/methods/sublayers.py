"""Where the sublayers of a block end: one description for all architectures, by what their modules are called."""

from __future__ import annotations

import re

from torch import nn

from tunesmith.base import InputError
from tunesmith.methods.targets import linear_modules

ATTENTION_ENDS = re.compile(
    r"\.(self_attn\.(o_proj|out_proj|dense)|attn\.(c_proj|out_proj|out_lin|o_proj|Wo)|attention\.(dense|out_lin|wo)"
    r"|attention\.output\.dense|self_attention\.dense|attention\.o_proj)$"
)
FEED_FORWARD_ENDS = re.compile(
    r"\.(mlp\.(down_proj|c_proj|fc2|dense_4h_to_h|fc_out|wo|Wo)|feed_forward\.(down_proj|w2|wo)|ffn\.lin2"
    r"|layer\.\d+\.output\.dense|layers\.\d+\.fc2|DenseReluDense\.wo)$"
)
FEED_FORWARDS = re.compile(r"\.\d+\.(mlp|feed_forward|ffn)$")
SPREAD = ((r"(layer\.\d+)\.output\.dense$", r"\1.intermediate.dense"), (r"(layers\.\d+)\.fc2$", r"\1.fc1"))
"""Last linear layers of feed-forward networks that are no module of their own, and the first ones (BERT, OPT)."""


def attention_ends(model: nn.Module) -> list[str]:
    """Names of the last linear layers of all attention sublayers.

    Raises:
        InputError: when none is known in this architecture.
    """
    return _known([name for name in linear_modules(model) if ATTENTION_ENDS.search(name)], "attention", model)


def feed_forward_ends(model: nn.Module) -> list[str]:
    """The same of all feed-forward sublayers."""
    return _known([name for name in linear_modules(model) if FEED_FORWARD_ENDS.search(name)], "feed-forward", model)


def feed_forwards(model: nn.Module) -> dict[str, str]:
    """Names of the feed-forward sublayers themselves; or of their last linear layer, with the name of the first."""
    found = {name: name for name, _ in model.named_modules() if FEED_FORWARDS.search(name)}
    for name in linear_modules(model) if not found else ():
        for last, first in SPREAD:
            if re.search(rf"\.{last}", name) and FEED_FORWARD_ENDS.search(name):
                found[name] = re.sub(last, first, name)
    _known(list(found), "feed-forward", model)
    return found


def _known(names: list[str], sublayer: str, model: nn.Module) -> list[str]:
    if not names:
        raise InputError(
            f"where the {sublayer} sublayers of a {type(model).__name__} end is not known",
            where="method.kind",
            fix="use method.kind: lora, which needs no such places",
        )
    return names
