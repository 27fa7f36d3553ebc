"""Sentence encoders: texts become vectors whose inner products say how alike they are (Reimers & Gurevych 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.base import InputError, Progress, silent
from tunesmith.files import read_json
from tunesmith.models.load import Loading, load_tokenizer, load_trunk, locate_model
from tunesmith.models.measure import position_limit
from tunesmith.models.minilm import MINILM, minilm_model
from tunesmith.models.sentence_settings import read_sentence_settings

TEXTS_AT_ONCE = 32
LENGTH_FILE = "sentence_bert_config.json"


@dataclass(frozen=True)
class Encoder:
    """A trunk that reads texts.

    Attributes:
        pooling: what makes one vector of a text's hidden states: their mean, or the first.
        window: tokens that are read at once, special ones included; a longer text is read in windows.
        around: special tokens before and after a text.
    """

    model: Any
    tokenizer: Any
    pooling: Literal["mean", "cls"]
    window: int
    around: tuple[list[int], list[int]]

    def vectors(self, texts: Sequence[str], progress: Progress = silent) -> Tensor:
        """Vectors of length 1, fp32 ``[texts, width]`` on the CPU.

        A text that is longer than the window is read in several, and its vector is their mean, each window counting
        as many times as it has tokens: nothing of it is cut.
        """
        of_texts = [self._windows(text) for text in texts]
        windows = [window for own in of_texts for window in own]
        owners = torch.tensor([at for at, own in enumerate(of_texts) for _ in own], dtype=torch.long)
        sizes = torch.tensor([len(window) for window in windows], dtype=torch.float32)
        found = torch.zeros(len(windows), int(self.model.config.hidden_size))
        order = sorted(range(len(windows)), key=lambda at: -len(windows[at]))
        for start in range(0, len(order), TEXTS_AT_ONCE):
            progress("reading texts with the sentence encoder", start, len(order))
            chosen = order[start : start + TEXTS_AT_ONCE]
            found[chosen] = self._pooled([windows[at] for at in chosen])
        progress("reading texts with the sentence encoder", len(order), len(order))
        weighted = F.normalize(found, dim=-1) * sizes[:, None]
        return F.normalize(torch.zeros(len(texts), found.shape[1]).index_add_(0, owners, weighted), dim=-1)

    def _windows(self, text: str) -> list[list[int]]:
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        before, after = self.around
        room = self.window - len(before) - len(after)
        parts = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
        return [[*before, *part, *after] for part in parts]

    def _pooled(self, windows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, windows))
        ids = torch.full((len(windows), longest), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros(len(windows), longest, dtype=torch.long)
        for at, window in enumerate(windows):
            ids[at, : len(window)], mask[at, : len(window)] = torch.tensor(window), 1
        device = next(self.model.parameters()).device
        with torch.no_grad():
            hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        hidden = hidden.float().cpu()
        if self.pooling == "cls":
            return hidden[:, 0]
        counted = mask[..., None].float()
        return (hidden * counted).sum(1) / counted.sum(1)


def load_encoder(name: str, device: torch.device, progress: Progress = silent) -> Encoder:
    """Loads an encoder with the pooling and the length that lie beside it.

    Args:
        name: a directory, a hub id, or `minilm`.

    Raises:
        InputError: when there is none, or nothing says how it makes one vector of a text.
    """
    location = (
        str(minilm_model(progress)) if name == MINILM and not Path(name).exists() else locate_model(name, progress)
    )
    settings = read_sentence_settings(location)
    if settings.pooling is None:
        reason = settings.unknown or "there is no 1_Pooling/config.json that says mean or cls"
        raise InputError(
            f"nothing says how this model makes one vector of a text: {reason}",
            where=name,
            fix=f"name a model of sentence-transformers, or {MINILM}",
        )
    tokenizer = load_tokenizer(location, writes=False)
    model = load_trunk(location, Loading(torch.float32, device))
    window = position_limit(cast(Any, model).config)
    with suppress(OSError, ValueError, KeyError, TypeError):
        window = min(window, int(read_json(Path(location) / LENGTH_FILE)["max_seq_length"]))
    plain = cast(list[int], tokenizer("x", add_special_tokens=False)["input_ids"])
    framed = cast(list[int], tokenizer("x")["input_ids"])
    start = next(at for at in range(len(framed)) if framed[at : at + len(plain)] == plain)
    return Encoder(model, tokenizer, settings.pooling, window, (framed[:start], framed[start + len(plain) :]))
