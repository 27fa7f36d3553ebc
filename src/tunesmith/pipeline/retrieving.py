"""Corpora from files, and rankers over texts that are made once and kept on disk by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.cache import cached
from tunesmith.data.read import KINDS, Reading
from tunesmith.data.record import RowErrors
from tunesmith.data.row import Row
from tunesmith.data.rows import open_rows
from tunesmith.evaluation.answers import turns_text
from tunesmith.models.encoder import Encoder, load_encoder
from tunesmith.pipeline.by_target import weights_sha256
from tunesmith.recipe_ladder import RankerName, filled
from tunesmith.retrieve import Bm25, Dense, Hybrid, Passage, Ranker, parted
from tunesmith.retrieve.passages import Counting
from tunesmith.retrieve.ranking import best

TEXTS = (".txt", ".md", ".rst")
INDEX_FORMAT = 1
"""Goes up when what is kept on disk changes."""


def read_corpus(path: str, most: int, count: Counting, progress: Progress = silent) -> list[Passage]:
    """The passages of a file, or of all files below a directory.

    Args:
        most: tokens of a passage.
        count: tokens of a text.

    Raises:
        InputError: when there is nothing to read, or a file cannot be read.
    """
    place = Path(path).expanduser()
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix.lower() in KINDS)
        if not files:
            raise InputError("no file here can be read as text or rows", where=path, fix=f"use {', '.join(KINDS)}")
    found: list[Passage] = []
    for number, file in enumerate(files):
        progress("reading the corpus", number, len(files))
        shown = path if file == place else str(file)
        if file.is_file() and file.suffix.lower() in TEXTS:
            found += parted(_text_of(file, shown), shown, most, count)
        else:
            errors = RowErrors()
            for row in open_rows(Reading(shown), errors):
                found += parted(row_text(row), str(row.source), most, count)
            errors.raise_any("mend those rows, or leave them out of the corpus")
    if not found:
        raise InputError("there is no text in it", where=path, fix="name a file or directory of texts or rows")
    return found


def row_text(row: Row) -> str:
    """A row as one text: raw text as it is, a conversation with its answer."""
    return turns_text(row.messages) if row.messages else row.text or " ".join(row.words)


def row_passages(rows: Sequence[Row]) -> list[Passage]:
    """Training rows as passages: question and answer, whole."""
    return [Passage(str(row.source), f"{asked(row)}\n{row.references[0]}") for row in rows]


def asked(row: Row) -> str:
    """What the last turn before the answer says: what a search is made with."""
    return str(row.messages[-2]["content"])


def _text_of(file: Path, shown: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8", where=shown, fix="save it as UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=shown, fix="name another file") from error


@dataclass
class Indexes:
    """Makes rankers; the encoder is loaded once, when it is first needed.

    Attributes:
        encoder: name of the encoder.
    """

    encoder: str
    device: torch.device
    progress: Progress = silent
    _made: dict[tuple[str, str], Ranker] = field(default_factory=dict)

    def ranker(self, kind: RankerName, texts: Sequence[str]) -> Ranker:
        """A ranker over texts, from the disk where it was made before."""
        content = sha256("\0".join(texts).encode()).hexdigest()
        key = kind, content
        if key not in self._made:
            if kind == "hybrid":
                self._made[key] = Hybrid([self.ranker("bm25", texts), self.ranker("dense", texts)])
            else:
                self._made[key] = self._bm25(texts, content) if kind == "bm25" else self._dense(texts, content)
        return self._made[key]

    @cached_property
    def loaded_encoder(self) -> Encoder:
        return load_encoder(self.encoder, self.device, self.progress)

    def _bm25(self, texts: Sequence[str], content: str) -> Bm25:
        return Bm25.load(cached({"bm25": INDEX_FORMAT, "texts": content}, lambda where: Bm25(texts).save(where)))

    def _dense(self, texts: Sequence[str], content: str) -> Dense:
        encoder = self.loaded_encoder
        read = [weights_sha256(encoder.model, encoder.model.config), encoder.pooling, encoder.window]

        def build(where: Path) -> None:
            np.save(where / "vectors.npy", encoder.vectors(texts, self.progress).numpy(), allow_pickle=False)

        where = cached({"dense": INDEX_FORMAT, "texts": content, "encoder": read}, build)
        return Dense(np.load(where / "vectors.npy", allow_pickle=False), encoder)


@dataclass(frozen=True)
class Library:
    """Passages that can be searched.

    Attributes:
        name: what it is, in words.
    """

    name: str
    passages: Sequence[Passage]
    indexes: Indexes

    def find(self, kind: RankerName, query: str, count: int) -> list[Passage]:
        """The passages that fit a query best, the best first."""
        ranker = self.indexes.ranker(kind, [passage.text for passage in self.passages])
        return [self.passages[at] for at in best(ranker.scores(query), count)]


def open_library(corpus: str, tokenizer: PreTrainedTokenizerBase, indexes: Indexes, most: int) -> Library:
    """A corpus that can be searched, its passages measured in a model's tokens.

    Args:
        most: tokens of a passage.

    Raises:
        InputError: as `read_corpus`.
    """

    def count(text: str) -> int:
        return len(cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    return Library(corpus, read_corpus(corpus, most, count, indexes.progress), indexes)


def behind_passages(question: str, passages: Sequence[Passage], template: str) -> str:
    """A question with what was found for it, numbered, in a template with `{passages}` and `{input}`."""
    texts = [f"[{number}] {passage.text}" for number, passage in enumerate(passages, 1)]
    return filled(template, passages="\n\n".join(texts), input=question)
