"""Tiny real models and data, built on the spot."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "TUNESMITH_DATA_CACHE" not in os.environ:
    os.environ["TUNESMITH_DATA_CACHE"] = tempfile.mkdtemp(prefix="tunesmith-data-")
    atexit.register(shutil.rmtree, os.environ["TUNESMITH_DATA_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads that wait for each other across them are many times slower.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tunesmith.models.templates import NAMED_TEMPLATES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = "red blue green small large round square old new soft hard cold warm fast slow quiet loud".split()
# Threads of several tests at once only wait for each other on models this small.
torch.set_num_threads(1)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def colour_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """A task that a tiny model can learn: the answer repeats the last word, upper-cased."""
    rows = []
    for at in range(start, start + count):
        one, two = WORDS[at % len(WORDS)], WORDS[(at // len(WORDS) + 3 * at) % len(WORDS)]
        rows.append({"prompt": f"Say {one} {at} {two}", "completion": f"{two.upper()} {one}"})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build_tokenizer(directory: Path, chat_template: str | None = NAMED_TEMPLATES["chatml"]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f"{row['prompt']} {row['completion']}" for row in colour_rows(200)] + ["user\nassistant\nsystem\n"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return fast


def build_model(directory: Path, model_type: str = "llama", **overrides: object) -> Path:
    """Saves a tiny random model of an architecture, with a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(directory)
    settings = {**TINY, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type in ("gemma3_text", "qwen3"):
        settings["head_dim"] = 8
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny") / "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", colour_rows(120))


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """The 135 M demo model; skips where it cannot be fetched, except in continuous integration."""
    from tunesmith.base import InputError
    from tunesmith.models.demo import demo_model

    try:
        return demo_model()
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the demo model cannot be fetched here: {error.what}")
