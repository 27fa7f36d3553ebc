"""What a model's weights are for: parameters by component, counted on the modules themselves."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

Part = Literal["embeddings", "attention", "mlp", "norms", "head", "other"]
PARTS: tuple[Part, ...] = get_args(Part)
_ATTENTION = ("attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv", "c_attn")
_MLP = ("mlp", "feed_forward", "ffn", "intermediate", "moe", "experts", "fc1", "fc2", "lin1", "lin2")
_HEADS = ("classifier", "score", "qa_outputs", "lm_head", "value_head", "cls")


def parameters_by_part(model: nn.Module) -> dict[Part, int]:
    """Parameters of each component; weights that are shared are counted once, as embeddings.

    A norm counts as one wherever it stands; a head is what makes outputs of the last hidden states.
    """
    found: dict[Part, int] = dict.fromkeys(PARTS, 0)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    inputs = set() if table is None else {id(weight) for weight in table.parameters()}
    outputs = (set() if head is None else {id(weight) for weight in head.parameters()}) - inputs
    seen = set[int]()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            part = "embeddings" if id(parameter) in inputs else "head" if id(parameter) in outputs else None
            found[part or _part_of(name, module)] += parameter.numel()
    return found


def _part_of(name: str, module: nn.Module) -> Part:
    words = name.lower().split(".")
    if "norm" in type(module).__name__.lower() or words[-1].startswith("ln_"):
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if words[0] in _HEADS:
        return "head"
    for word in reversed(words):  # the innermost name says it: BERT keeps `attention.output.dense` and `output.dense`
        if any(mark in word for mark in _ATTENTION):
            return "attention"
        if any(mark in word for mark in _MLP):
            return "mlp"
    # BERT's second feed-forward layer is `layer.N.output.dense`.
    return "mlp" if "output" in words and any(word.isdigit() for word in words) else "other"
