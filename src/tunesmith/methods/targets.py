"""Which modules of a model a method touches: presets and regular expressions, every one of which must match."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.base import InputError, nearest
from tunesmith.models.task_head import head_modules

PRESETS = ("all-linear", "attention", "mlp", "qv")

ATTENTION_NAMES = frozenset(
    "q_proj k_proj v_proj o_proj out_proj qkv_proj query key value dense_attention c_attn query_key_value Wqkv "
    "q_lin k_lin v_lin out_lin q k v o wq wk wv wo in_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj".split()
)
QUERY_VALUE_NAMES = frozenset("q_proj v_proj query value q_lin v_lin q v wq wv".split())
ATTENTION_PARENTS = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention|self_attn_layer)(\.|$)")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers by name, the output head among them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def output_head_name(model: nn.Module) -> str | None:
    """Name of the module that maps hidden states to logits, if the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _in_a_head(model: nn.Module, name: str) -> bool:
    return name == output_head_name(model) or name.partition(".")[0] in head_modules(model)


def matches(pattern: str, name: str) -> bool:
    """PEFT's rule for patterns: the whole name, or its last components."""
    return re.match(_anywhere(pattern), name) is not None


def _anywhere(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def exactly(name: str) -> str:
    """A regular expression for one module."""
    return "^" + name.replace(".", r"\.")


def select_modules(model: nn.Module, targets: str | Sequence[str], *, key: str) -> dict[str, nn.Module]:
    """Resolves a preset, or regular expressions over module names, to modules.

    Raises:
        InputError: when a preset does not exist for this architecture, an expression is malformed, or one of them
            matches nothing; the message lists what the model has.
    """
    linears = linear_modules(model)
    if isinstance(targets, str) and targets in PRESETS:
        trunk = {name: module for name, module in linears.items() if not _in_a_head(model, name)}
        return _preset(targets, trunk, key=key)
    candidates = {**linears, **embedding_modules(model)}
    chosen: dict[str, nn.Module] = {}
    for pattern in [targets] if isinstance(targets, str) else targets:
        compile_pattern(pattern, key=key)
        found = {name: module for name, module in candidates.items() if matches(pattern, name)}
        if not found:
            raise InputError(
                f"{pattern!r} matches no linear or embedding layer"
                + nearest(pattern, [*PRESETS, *(name.rsplit(".", 1)[-1] for name in candidates)]),
                where=key,
                fix=f"presets: {', '.join(PRESETS)}; this model has: {available(candidates)}",
            )
        chosen.update(found)
    return {name: module for name, module in candidates.items() if name in chosen}


def compile_pattern(pattern: str, *, key: str) -> None:
    try:
        re.compile(_anywhere(pattern))  # flags that stand first in a pattern, as in (?i)norm, stand inside there
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}", where=key) from error


def available(modules: dict[str, nn.Module]) -> str:
    """Last components of module names with their counts, for messages."""
    counts = Counter(name.rsplit(".", 1)[-1] for name in modules)
    return ", ".join(f"{name} ×{count}" for name, count in counts.items())


def _preset(preset: str, linears: dict[str, nn.Module], *, key: str) -> dict[str, nn.Module]:
    def in_attention(name: str) -> bool:
        parent, _, leaf = name.rpartition(".")
        return leaf in ATTENTION_NAMES or ATTENTION_PARENTS.search(parent) is not None

    if preset == "all-linear":
        chosen = linears
    elif preset == "attention":
        chosen = {name: module for name, module in linears.items() if in_attention(name)}
    elif preset == "mlp":
        chosen = {name: module for name, module in linears.items() if not in_attention(name)}
    else:
        chosen = {name: module for name, module in linears.items() if name.rsplit(".", 1)[-1] in QUERY_VALUE_NAMES}
    if not chosen:
        fused = " (its query, key and value are one fused projection: use `attention`)" if preset == "qv" else ""
        raise InputError(
            f"the preset {preset!r} finds no layers in this architecture{fused}",
            where=key,
            fix=f"name the layers by a regular expression; this model has: {available(linears)}",
        )
    return chosen
