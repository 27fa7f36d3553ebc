"""Rows on disk with a small index in memory, so that a data set may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from struct import Struct

import numpy as np

from tunesmith.base import Source
from tunesmith.data.row import Row
from tunesmith.files import BytesAt

INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("line", "<u4"),
        ("source", "<u2"),
        ("emptiness", "u1"),
        ("key", "S16"),
        ("prompt", "S16"),
        ("group", "S16"),
        ("stratum", "S16"),
    ]
)
"""What is known of a row without reading it; keys are 128-bit hashes, which stand for equality. The sources are the
training sources and then the held-out files, in the order in which they were read."""

EMPTINESS = ("", "the text is empty", "the answer is empty", "the prompt is empty")

_ROWS, _INDEX = "rows.jsonl", "rows.npy"
_ENTRY = Struct("<QIIHB16s16s16s16s")
"""``INDEX`` as bytes; filling an array field by field takes ten times as long."""


class RowFile:
    """Rows in the order in which they were read.

    Attributes:
        index: array of ``INDEX``, one entry a row.
        identity: the same for the same rows.
    """

    def __init__(self, directory: Path) -> None:
        self.index: np.ndarray = np.load(directory / _INDEX)
        self._file = BytesAt(directory / _ROWS)
        self.directory, self.identity = directory, directory.name

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Row:
        entry = self.index[number]
        return Row.from_json(self._file.read(int(entry["offset"]), int(entry["length"])).decode("utf-8"))

    def column(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """One field of the index."""
        return self.index[name][numbers]

    def source(self, number: int) -> Source:
        return self[int(number)].source

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, Row]]:
        """Rows one after the other, which is quick when the numbers ascend."""
        for number in numbers:
            yield int(number), self[int(number)]


class RowFileWriter:
    """Writes a ``RowFile`` row by row; memory holds the index alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self._file = open(directory / _ROWS, "wb")  # noqa: SIM115 (closed by close)
        self._offset = 0
        self._index = bytearray()

    def add(self, row: Row, source: int) -> None:
        text = row.to_json().encode("utf-8")
        self._index += _ENTRY.pack(
            self._offset,
            len(text),
            row.source.line,
            source,
            EMPTINESS.index(emptiness(row)),
            bytes.fromhex(row.key),
            bytes.fromhex(row.prompt_key),
            b"" if row.group is None else _hashed(row.group),
            b"" if row.stratum is None else _hashed(row.stratum),
        )
        self._file.write(text + b"\n")
        self._offset += len(text) + 1
        self.count += 1

    def close(self) -> None:
        self._file.close()
        np.save(self.directory / _INDEX, np.frombuffer(self._index, INDEX))


def emptiness(row: Row) -> str:
    """What a row leaves unsaid, one of ``EMPTINESS``."""
    if row.words:
        return ""
    if not row.messages:
        return "" if row.text.strip() else "the text is empty"
    turns = (*row.messages, *row.rejected[-1:])
    answers = [m["content"] for m in turns if m["role"] == "assistant" and not m.get("tool_calls")]
    if not all(text.strip() for text in answers):
        return "the answer is empty"
    asked = [m["content"] for m in row.messages[:-1] if m["role"] == "user"]
    return "" if all(text.strip() for text in asked) else "the prompt is empty"


def _hashed(text: str) -> bytes:
    return blake2b(text.encode("utf-8"), digest_size=16).digest()
