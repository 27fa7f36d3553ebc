"""Small models with a tokenizer, and rows with labels that they can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from conftest import build_tokenizer, write_jsonl

COLOURS = ("red", "green", "blue")
THINGS = ("cars", "trees", "boats", "doors", "hats")
NAMES = ("Ann", "Bob", "Eve")
FILLERS = ("see", "like", "want", "paint", "the", "some", "with", "friends", "today", "now")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
PECULIAR: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
}


def encoder_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and letters, with [CLS] before and [SEP] behind a text."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)] + [str(digit) for digit in range(10)]
    words = [word.lower() for word in (*COLOURS, *THINGS, *NAMES, *FILLERS)]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    inner = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **names, mask_token="[MASK]")
    fast.save_pretrained(directory)
    return fast


def build_trunk(directory: Path, model_type: str = "bert", **overrides: Any) -> Path:
    """Saves a tiny random encoder, or decoder without its output layer, with a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(directory) if model_type == "llama" else encoder_tokenizer(directory)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "initializer_range": 0.2, **PECULIAR.get(model_type, {})}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(model_type, **{**sizes, **overrides})).save_pretrained(directory)
    return directory


def _pick(at: int, choices: tuple[str, ...], step: int) -> str:
    return choices[(at * step + at // len(choices)) % len(choices)]


def text_of(at: int) -> str:
    return f"{_pick(at, NAMES, 2)} {_pick(at, FILLERS[:4], 3)} {_pick(at, COLOURS, 1)} {_pick(at, THINGS, 2)} {at}"


def classify_rows(count: int) -> list[dict[str, Any]]:
    """The label is the colour."""
    return [{"text": text_of(at), "label": _pick(at, COLOURS, 1)} for at in range(count)]


def several_rows(count: int) -> list[dict[str, Any]]:
    """A label for each colour that stands there; some rows have none, some two."""
    rows = []
    for at in range(count):
        found = [colour for place, colour in enumerate(COLOURS) if (at >> place) & 1]
        rows.append({"text": " ".join([*found, _pick(at, THINGS, 2), str(at)]), "labels": found})
    return rows


def number_rows(count: int) -> list[dict[str, Any]]:
    """The number tells the colour."""
    return [{"text": text_of(at), "label": 1.5 * COLOURS.index(_pick(at, COLOURS, 1))} for at in range(count)]


def tag_rows(count: int) -> list[dict[str, Any]]:
    """Names are people, colour and thing together are an object."""
    rows = []
    for at in range(count):
        words = text_of(at).split()
        rows.append({"tokens": words, "ner_tags": ["B-PER", "O", "B-OBJ", "I-OBJ", "O"]})
    return rows


ROWS = {"classify": classify_rows, "several": several_rows, "regress": number_rows, "tag": tag_rows}


def write_rows(directory: Path, kind: str, count: int = 120) -> Path:
    return write_jsonl(directory / f"{kind}.jsonl", ROWS[kind](count))
