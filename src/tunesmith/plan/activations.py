"""What a forward pass keeps for the backward pass, tensor by tensor, from the shapes of the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tunesmith.methods.low_rank import lora_layers
from tunesmith.models.head import LOGITS_AT_ONCE, WIDE_AT_ONCE
from tunesmith.models.measure import Shape
from tunesmith.models.row_attention import BLOCK

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Kept:
    """Bytes of one token.

    Attributes:
        blocks: what all blocks keep.
        block: what the largest of them keeps.
        inputs: what all blocks keep when they are computed again (Chen et al. 2016).
        passing: what one block needs and drops again, without a gradient.
        backward: the same while its gradient is computed.
    """

    blocks: float
    block: float
    inputs: float
    passing: float
    backward: float

    def of_token(self, checkpointing: bool) -> float:
        return self.inputs + self.block if checkpointing else self.blocks


def kept_by_token(adapted: nn.Module, shape: Shape, dtype: str, frozen_dtype: str) -> Kept:
    """Bytes of one token for an adapted model.

    Blocks of the Llama shape keep, per token: the residual stream before each norm, in the dtype of the embeddings;
    what each norm returns where a trained layer reads it; queries, keys and values after rotation; what attention
    returns; gate and up; and the inputs of the low-rank updates. All but the first in the dtype of the arithmetic.
    Other blocks run through autograd, which keeps the input or the output of nearly every operation.
    """
    width, residual = BYTES[dtype], BYTES[frozen_dtype]
    hidden, inner, query, pairs = shape.hidden, shape.intermediate, shape.query, shape.key_value
    inputs = shape.layers * hidden * (residual + width)
    passing = 2 * hidden * residual + width * (2 * hidden + 2 * (query + pairs) + 3 * inner)
    backward = width * (3 * inner + 3 * hidden)
    if not shape.fused or not all(map(_is_plain, cast(Any, adapted).model.layers)):
        beside = 2 * inner + 3 * hidden + pairs
        blocks = width * (shape.linear_outputs + shape.layers * beside) + shape.layers * 16 * hidden
        return Kept(blocks, blocks / max(1, shape.layers), inputs, passing, backward)
    sizes = [_kept_by_block(block, shape, width, residual) for block in cast(Any, adapted).model.layers]
    return Kept(sum(sizes), max(sizes), inputs, passing, backward)


def _is_plain(block: Any) -> bool:
    """Whether no method has put a layer of its own around the attention or the feed-forward part."""
    named = ((block.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")), (block.mlp, ("gate_proj", "up_proj")))
    return all(hasattr(part, name) for part, names in named for name in names)


def _kept_by_block(block: Any, shape: Shape, width: int, residual: int) -> float:
    attention, mlp = block.self_attn, block.mlp
    readers = (
        (shape.hidden, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (shape.query, (attention.o_proj,)),
        (shape.hidden, (mlp.gate_proj, mlp.up_proj)),
    )
    inputs = sum(features for features, layers in readers if any(map(_is_trained, layers)))
    ranks = sum(layer.lora_A.shape[0] for layer in lora_layers(block).values())
    kept = width * (inputs + shape.query + shape.key_value + 2 * shape.intermediate + ranks)
    kept += 2 * shape.hidden * residual + 2 * 4
    if shape.head_norms:
        kept += width * (shape.query + shape.key_value // 2) + 4 * shape.heads
    return kept


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def attention_workspace(shape: Shape, tokens: int, longest: int, width: int) -> float:
    """Scores of one block of queries, their shares and the gradient of these, where no fused kernel runs (a CPU)."""
    query_heads = shape.heads - shape.key_value // max(1, 2 * _head_dim(shape))
    return 3.0 * width * query_heads * tokens * min(longest, BLOCK)


def _head_dim(shape: Shape) -> int:
    """Features of a head: queries and keys together are heads times that many."""
    return (shape.query + shape.key_value // 2) // max(1, shape.heads)


def logit_bytes(shape: Shape, targets: int, width: int) -> float:
    """Logits that exist at a time: of a few rows where the head is asked apart, and what of them is looked at in
    fp32."""
    at_once = min(targets, max(1, LOGITS_AT_ONCE // max(1, shape.vocabulary)))
    return at_once * shape.vocabulary * width + 3 * 4 * min(WIDE_AT_ONCE, at_once * shape.vocabulary)
