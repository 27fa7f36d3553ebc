"""Tiny models in memory and random rows, for tests that need no tokenizer and no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.batch import Example
from tunesmith.methods.low_rank import lora_layers

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that attention is not nearly uniform: what rows leak to each other must show.
    "initializer_range": 0.2,
}
PECULIARITIES: dict[str, dict[str, Any]] = {
    # GPT-2 has as many key heads as heads; PEFT believes the key when it stands there.
    "gpt2": {"num_key_value_heads": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "lfm2": {"full_attn_idxs": [1]},
    "llama4_text": {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4},
    "phi3": {"sliding_window": 6, "resid_pdrop": 0.0},
    "phimoe": {"num_local_experts": 4, "sliding_window": 64},
    "qwen3": {"head_dim": 8},
}


def tiny_config(model_type: str = "llama", **overrides: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **PECULIARITIES.get(model_type, {}), **overrides})


def tiny(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of an architecture, in evaluation mode; the same one for the same arguments."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=dtype).eval()


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Moves every LoRA layer away from zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.2)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    return model


def random_rows(lengths: Sequence[int], *, seed: int = 0, weights: Sequence[float] = (1.0,)) -> list[Example]:
    """Rows of random tokens; the second part of each is trained on, with weights drawn from ``weights``."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        drawn = torch.tensor(weights)[torch.randint(len(weights), (length,), generator=generator)]
        trained = torch.arange(length) >= max(1, length // 2)
        rows.append(
            Example(
                torch.randint(3, VOCABULARY, (length,), generator=generator),
                {"target_weights": torch.where(trained, drawn, torch.zeros(length))},
                {"target_weights": "token"},
            )
        )
    return rows


def reference_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """Logits of one row, run alone by transformers' own attention: ``[length, vocabulary]``."""
    language_model: Any = model
    language_model.set_attn_implementation("eager")
    with torch.no_grad():
        return language_model(input_ids=token_ids[None], use_cache=False).logits[0]
