"""Token ids and target weights of rows on disk, made once for the same content, read row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.base import Progress
from tunesmith.batch import Example, answers_behind
from tunesmith.data.cache import cached
from tunesmith.data.record import BadRow
from tunesmith.data.render import TOKEN_SCOPES, Rendered, RowRenderer
from tunesmith.data.row_file import RowFile
from tunesmith.files import BytesAt, read_json, write_json

INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("reach", "<u4"),
        ("prompt", "<u4"),
        ("other", "<u4"),
        ("targets", "<u4"),
        ("bad", "?"),
    ]
)
"""Where the tokens of a row begin (in tokens), how many there are, how many positions they need (fewer where two
answers share their prompt), how many of them stand before the last answer, where a second answer to the same prompt
begins (0 where there is none), how many are trained on, and whether the row cannot be rendered."""

AT_ONCE = 8192
"""Rows that are rendered together: enough for the tokenizer's threads, little for memory."""

_IDS, _WEIGHTS, _INDEX, _REST = "tokens.bin", "weights.bin", "tokens.npy", "tokens.json"
_BYTES = 4


class TokenFile:
    """Every row of a ``RowFile`` as the model sees it.

    Attributes:
        index: array of ``INDEX``, one entry a row.
        bad: what is wrong with rows that the template refuses, by their number.
    """

    def __init__(self, directory: Path) -> None:
        self.index: np.ndarray = np.load(directory / _INDEX)
        rest = read_json(directory / _REST)
        self.bad: dict[int, str] = {int(number): what for number, what in rest["bad"].items()}
        self._learned: dict[str, Any] = rest["learned"]
        self._references: dict[str, list[str]] = rest["references"]
        self._ids, self._weights = BytesAt(directory / _IDS), BytesAt(directory / _WEIGHTS)

    def teach(self, renderer: RowRenderer) -> None:
        """Tells a renderer what the one that made these tokens found out about template and tokenizer."""
        renderer.learn_stop_ids()
        renderer.stop_ids |= set(self._learned["stop_ids"])
        renderer.used_controls |= set(self._learned["used_controls"])
        renderer.notes[:] = self._learned["notes"]

    def rendered(self, rows: RowFile, number: int) -> Rendered:
        entry = self.index[number]
        at, size = int(entry["offset"]) * _BYTES, int(entry["length"]) * _BYTES
        ids = np.frombuffer(self._ids.read(at, size), "<i4")
        weights = np.frombuffer(self._weights.read(at, size), "<f4")
        row = rows[number]
        if str(number) in self._references:
            row = replace(row, references=tuple(self._references[str(number)]))
        tensors = {"target_weights": torch.from_numpy(weights.copy())}
        segments = answers_behind(int(entry["prompt"]), int(entry["other"]), len(ids)) if entry["other"] else None
        example = Example(torch.from_numpy(ids.astype(np.int64)), tensors, TOKEN_SCOPES, row.source, segments)
        return Rendered(row, example, tuple(ids[: entry["prompt"]].tolist()), closing=self._learned.get("closing"))


class TokenFileWriter:
    """Writes a ``TokenFile`` row by row; memory holds the index alone."""

    def __init__(self, directory: Path, rows: int) -> None:
        self.directory = directory
        self.index = np.zeros(rows, INDEX)
        self._ids = open(directory / _IDS, "wb")  # noqa: SIM115 (closed by close)
        self._weights = open(directory / _WEIGHTS, "wb")  # noqa: SIM115
        self._offset = 0
        self._bad: dict[int, str] = {}
        self._references: dict[int, list[str]] = {}

    def add(self, number: int, references: Sequence[str], item: Rendered | BadRow) -> None:
        """
        Args:
            references: those of the row before it was rendered.
            item: the row rendered, or what is wrong with it.
        """
        entry = self.index[number]
        if isinstance(item, BadRow):
            entry["bad"], self._bad[number] = True, str(item)
            return
        length = len(item.example)
        entry["offset"], entry["length"], entry["prompt"] = self._offset, length, len(item.prompt_ids)
        entry["reach"] = item.example.reach
        entry["other"] = 0 if item.example.segments is None else int(item.example.segments[2, 0])
        weights = item.example.tensors["target_weights"].numpy()
        entry["targets"] = np.count_nonzero(weights)
        self._ids.write(item.example.token_ids.numpy().astype("<i4").tobytes())
        self._weights.write(weights.astype("<f4", copy=False).tobytes())
        self._offset += length
        if tuple(references) != item.row.references:
            self._references[number] = list(item.row.references)

    def close(self, renderer: RowRenderer) -> None:
        self._ids.close()
        self._weights.close()
        np.save(self.directory / _INDEX, self.index)
        learned = {
            "stop_ids": sorted(renderer.stop_ids),
            "used_controls": sorted(renderer.used_controls),
            "notes": renderer.notes,
            "closing": getattr(renderer, "closing", None),
        }
        rest = {"bad": self._bad, "references": self._references, "learned": learned}
        write_json(self.directory / _REST, rest)


def tokens_of(rows: RowFile, renderer: RowRenderer, progress: Progress) -> TokenFile:
    """Renders every row once and keeps the tokens on disk.

    Raises:
        InputError: when the template is unfit for every row. What is wrong with single rows is kept beside them.
    """
    identity = renderer.identity()

    def build(directory: Path) -> None:
        writer = TokenFileWriter(directory, len(rows))
        numbers = iter(range(len(rows)))
        done = 0
        while chunk := list(islice(numbers, AT_ONCE)):
            progress("rendering rows", done, len(rows))
            read = [rows[number] for number in chunk]
            for number, row, item in zip(chunk, read, renderer.render_many(read), strict=True):
                writer.add(number, row.references, item)
            done += len(chunk)
        writer.close(renderer)

    directory = cached({"tokens": identity, "rows": rows.identity, "index": INDEX.descr}, build)
    tokens = TokenFile(directory)
    tokens.teach(renderer)
    return tokens
