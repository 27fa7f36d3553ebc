"""Randomly initialised models of about 100 M parameters in the shapes of other families, with the demo tokenizer.

python bench/random_models.py gemma3|qwen3|gpt2 DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FAMILIES = ("gemma3", "qwen3", "gpt2")


def write_model(family: str, directory: Path) -> None:
    """Writes weights in bf16, configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.models.demo import demo_model

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family, tokenizer), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _config(family: str, tokenizer: Any) -> Any:
    from transformers import Gemma3TextConfig, GPT2Config, Qwen3Config

    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":  # the smallest published size
        return GPT2Config(n_embd=768, n_layer=12, n_head=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **tokens)
    shared = {
        "hidden_size": 640,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **tokens,
    }
    if family == "gemma3":  # the widths of the 270 M model
        heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        return Gemma3TextConfig(num_hidden_layers=14, intermediate_size=2048, **heads, **shared)
    heads = {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64}
    return Qwen3Config(num_hidden_layers=14, intermediate_size=1920, **heads, **shared)


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
