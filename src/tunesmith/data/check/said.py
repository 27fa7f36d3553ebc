"""What a row says, taken apart once for all checks, and the store that keeps it for the checks that compare rows."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.base import InputError, Source
from tunesmith.data.check.words import folded, hash_of
from tunesmith.data.row import Row

Kind = Literal["conversation", "text", "token labels"]

HELD_OUT = ("validation", "test")
"""Names of splits that are never trained on; rows of every other name count as training rows."""

_IN_MEMORY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Said:
    """The texts of one row.

    Attributes:
        number: the caller's index of the row.
        prompt: everything before the last answer, system turns left out; the whole text of a row without answers.
        answer: the last answer; for token labels, the labels.
        question: the last turn before the answer.
        everything: all that stands in the row, system turns included.
        rejected: the rejected answer of a preference pair, else None.
        bare: whether the conversation is one user turn and its answer, with nothing before.
    """

    row: Row
    number: int
    training: bool
    split: str
    kind: Kind
    prompt: str
    answer: str
    question: str
    everything: str
    rejected: str | None
    bare: bool

    @property
    def source(self) -> Source:
        return self.row.source


def said_by(row: Row, split: str, number: int) -> Said:
    training = split not in HELD_OUT
    if row.words:
        words, labels = " ".join(row.words), " ".join(str(label) for label in row.labels)
        return Said(row, number, training, split, "token labels", words, labels, words, words, None, False)
    if not row.messages:
        return Said(row, number, training, split, "text", row.text, "", row.text, row.text, None, False)
    turns = [(message["role"], _content(message)) for message in row.messages]
    before = [content for role, content in turns[:-1] if role != "system"]
    rejected = _content(row.rejected[-1]) if row.rejected else None
    everything = [content for _, content in turns] + ([rejected] if rejected else [])
    return Said(
        row,
        number,
        training,
        split,
        "conversation",
        prompt=before[0] if len(before) == 1 else "\n".join(before),
        answer=turns[-1][1],
        question=before[-1] if before else "",
        everything="\n".join(everything),
        rejected=rejected,
        bare=len(turns) == 2,
    )


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


@dataclass(frozen=True)
class Columns:
    """Every stored row as arrays ``[rows]``.

    Attributes:
        text: hash of prompt and answer with case and white space folded.
        prompt: hash of everything before the last answer, system turns and tools included, folded.
        answer: hash of the folded answer without punctuation at its ends.
        training: whether the row is trained on.
        one_answer: whether the row is a conversation with one right answer and no rejected one.
        split: index of the split's name.
        number: the caller's index.
    """

    text: NDArray[np.uint64]
    prompt: NDArray[np.uint64]
    answer: NDArray[np.uint64]
    training: NDArray[np.bool_]
    one_answer: NDArray[np.bool_]
    split: NDArray[np.uint8]
    number: NDArray[np.int64]


class Store:
    """Texts in a temporary file and 50 bytes a row in memory."""

    def __init__(self) -> None:
        # Small data never reaches the disk.
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, mode="w+b")  # noqa: SIM115
        self._end = 0
        self._start, self._prompt_bytes, self._answer_bytes = array("Q"), array("I"), array("I")
        self._text, self._prompt, self._answer = array("Q"), array("Q"), array("Q")
        self._flags, self._split, self._number = array("B"), array("B"), array("q")
        self._file_of, self._line = array("I"), array("q")
        self._files: dict[str, int] = {}
        self._splits: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._start)

    def add(self, said: Said) -> None:
        """Raises InputError when there is no room for the temporary file."""
        prompt, answer = (text.encode("utf-8", "surrogatepass") for text in (said.prompt, said.answer))
        try:
            self._file.seek(self._end)
            self._file.write(prompt)
            self._file.write(answer)
        except OSError as error:
            raise InputError(
                f"the texts of the rows cannot be kept in a temporary file ({error.strerror or error})",
                where=tempfile.gettempdir(),
                fix="make room there, or set the environment variable TMPDIR to a folder with as much room as the data",
            ) from error
        self._start.append(self._end)
        self._prompt_bytes.append(len(prompt))
        self._answer_bytes.append(len(answer))
        self._end += len(prompt) + len(answer)
        folded_answer = folded(said.answer)
        self._text.append(hash_of(f"{folded(said.prompt)}\x00{folded_answer}"))
        self._prompt.append(int(said.row.prompt_key[:16], 16))
        self._answer.append(hash_of(folded_answer.strip(" .,;:!?\"'`")))
        one_answer = said.kind == "conversation" and len(said.row.references) <= 1 and said.rejected is None
        self._flags.append(said.training + 2 * one_answer)
        self._split.append(min(self._splits.setdefault(said.split, len(self._splits)), 255))
        self._number.append(said.number)
        self._file_of.append(self._files.setdefault(said.source.file, len(self._files)))
        self._line.append(said.source.line)

    def columns(self) -> Columns:
        flags = np.array(self._flags, dtype=np.uint8)
        return Columns(
            text=np.array(self._text, dtype=np.uint64),
            prompt=np.array(self._prompt, dtype=np.uint64),
            answer=np.array(self._answer, dtype=np.uint64),
            training=(flags & 1).astype(bool),
            one_answer=(flags & 2).astype(bool),
            split=np.array(self._split, dtype=np.uint8),
            number=np.array(self._number, dtype=np.int64),
        )

    def source(self, index: int) -> Source:
        return Source(list(self._files)[self._file_of[index]], self._line[index])

    def texts(self, index: int) -> tuple[str, str]:
        """Prompt and answer of a row, by the order of adding."""
        self._file.seek(self._start[index])
        cut = self._prompt_bytes[index]
        stored = self._file.read(cut + self._answer_bytes[index])
        return stored[:cut].decode("utf-8", "surrogatepass"), stored[cut:].decode("utf-8", "surrogatepass")


def rows_with(hits: NDArray[np.bool_], numbers: NDArray[np.int64]) -> list[int]:
    """The callers' indices of the rows that are hit, in rising order."""
    return sorted(int(n) for n in numbers[hits])


def evenly(count: int, most: int) -> Sequence[int]:
    """At most ``most`` of ``count`` indices, evenly spread."""
    return range(count) if count <= most else [int(i) for i in np.linspace(0, count - 1, most)]
