"""What a model would be, from its configuration alone: shapes on the meta device, no weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tunesmith.models.decoder import shape_obstacle
from tunesmith.models.load import told_plainly
from tunesmith.models.task_head import TaskHead, head_modules, model_class

FALLBACK_POSITIONS = 1_000_000
_STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def meta_model(config: PreTrainedConfig, path: str, head: TaskHead | None = None) -> nn.Module:
    """The architecture without storage. Raises InputError when transformers has no such model for it."""
    if head is not None:
        config = copy.deepcopy(config)
        config.update(head.settings())
    with told_plainly("the model's architecture", path), torch.device("meta"):
        return model_class(head).from_config(config)


def position_limit(config: PreTrainedConfig) -> int:
    """Longest sequence that the model was made for, in tokens."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return FALLBACK_POSITIONS


@dataclass(frozen=True)
class Shape:
    """Sizes that memory and time depend on.

    Attributes:
        layers: decoder blocks.
        hidden: width of the residual stream.
        intermediate: width inside the feed-forward part.
        key_value: features of keys and values together, per token and layer.
        vocabulary: rows of the output head.
        linear_weights: weights of all linear layers but the output head.
        linear_outputs: features that those layers produce for one token.
        head_weights: weights of the output head.
        query: features of the queries of all heads, per token and layer.
        heads: query heads and key-value heads together.
        head_norms: whether queries and keys have norms of their own.
        fused: whether the blocks have the Llama shape, for which gradients are written by hand.
        head_tied: whether the head's weights are those of the embeddings.
        stored: the dtype that the configuration names for the weights on disk: `fp32`, `bf16` or `fp16`.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    linear_weights: int
    linear_outputs: int
    head_weights: int
    query: int = 0
    heads: int = 0
    head_norms: bool = False
    fused: bool = False
    head_tied: bool = False
    stored: str = "fp32"


def shape_of(model: nn.Module) -> Shape:
    """Reads sizes off the modules themselves, so that no architecture needs a rule of its own."""
    from transformers.pytorch_utils import Conv1D

    config: Any = model.config
    text = config.get_text_config()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    judging = head_modules(model)
    weights = outputs = 0
    widest = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weights += module.weight.numel()
            outputs += module.out_features
            widest = max(widest, module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            weights += module.weight.numel()
            outputs += int(module.weight.shape[1])
            widest = max(widest, int(module.weight.shape[1]))
    hidden = int(text.hidden_size)
    layers = int(text.num_hidden_layers)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    key_value_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    head_weights = head.weight.numel() if head is not None else 0
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or widest),
        key_value=2 * key_value_heads * head_dim,
        vocabulary=int(config.num_labels if judging else text.vocab_size),
        linear_weights=weights,
        linear_outputs=outputs,
        head_weights=head_weights,
        query=heads * head_dim,
        heads=heads + key_value_heads,
        head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        fused=shape_obstacle(model) is None,
        head_tied=head is not None and table is not None and head.weight is getattr(table, "weight", None),
        stored=_STORED.get(str(getattr(config, "dtype", None)).removeprefix("torch."), "fp32"),
    )
