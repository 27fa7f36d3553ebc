"""Rows and their tokens side by side: what every question about a data set is answered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import cast, overload

import numpy as np
from torch import Tensor

from tunesmith.batch import Scope
from tunesmith.data.render import Rendered
from tunesmith.data.render_pairs import with_partner
from tunesmith.data.row import Row
from tunesmith.data.row_file import RowFile
from tunesmith.data.token_file import TokenFile
from tunesmith.data.truncate import truncated


@dataclass(frozen=True)
class Stored:
    """Every row of a job, by its number, counted from 0 over all sources."""

    rows: RowFile
    tokens: TokenFile

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 ``[rows]``."""
        return self.tokens.index["length"][numbers].astype(np.int64)

    def reach(self, numbers: np.ndarray) -> np.ndarray:
        """Positions that each row needs, int64 ``[rows]``: its tokens, but a prompt shared by two answers once."""
        return self.tokens.index["reach"][numbers].astype(np.int64)

    def targets(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each row that are trained on, int64 ``[rows]``."""
        return self.tokens.index["targets"][numbers].astype(np.int64)

    def rendered(self, number: int) -> Rendered:
        return self.tokens.rendered(self.rows, int(number))


class RenderedRows(Sequence[Rendered]):
    """Some of the rows, in order; each is read when it is asked for.

    Attributes:
        numbers: int64 ``[rows]``, which rows.
        lengths: int64 ``[rows]``, tokens of each, after cutting.
        targets: int64 ``[rows]``, tokens of each that are trained on, after cutting.
        limit: rows longer than this are cut at the end of the answer; None when nothing is cut.
        partners: where behind each prompt, after its own answer, the answer of the next row stands: the most positions
            of both together; else None.
        added: gives more tensors of a row, one entry a target each, from its place among these rows and itself.
    """

    def __init__(self, stored: Stored, numbers: np.ndarray, limit: int | None = None) -> None:
        self.stored, self.limit = stored, limit
        self.added: Callable[[int, Rendered], dict[str, Tensor]] | None = None
        self.partners: int | None = None
        self.numbers = np.asarray(numbers, np.int64)
        self.lengths, self.targets = stored.lengths(self.numbers), stored.targets(self.numbers)
        for at in np.nonzero(stored.reach(self.numbers) > limit)[0] if limit is not None else ():
            shorter = self[int(at)].example
            self.lengths[at], self.targets[at] = len(shorter), shorter.targets

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Rendered: ...
    @overload
    def __getitem__(self, at: slice) -> list[Rendered]: ...
    def __getitem__(self, at: int | slice) -> Rendered | list[Rendered]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        item = self._own(at)
        if self.partners is not None:
            item = with_partner(item, self._own((at + 1) % len(self)), self.partners)
        if self.added is None:
            return item
        more = self.added(at % len(self), item)
        tensors = {**item.example.tensors, **more}
        scopes: dict[str, Scope] = {**item.example.scopes, **dict.fromkeys(more, "target")}
        return replace(item, example=replace(item.example, tensors=tensors, scopes=scopes))

    @property
    def uncut(self) -> np.ndarray:
        """int64 ``[rows]``, tokens of each before cutting."""
        return self.stored.lengths(self.numbers)

    def _own(self, at: int) -> Rendered:
        item = self.stored.rendered(int(self.numbers[at]))
        if self.limit is not None and item.example.reach > self.limit:
            item = cast(Rendered, truncated(item, self.limit))
        return item

    def with_partners(self, limit: int) -> RenderedRows:
        """The same rows, each with the next row's answer behind its prompt too (the first one's behind the last's).

        Args:
            limit: positions of the model, to which such an answer is cut.
        """
        found = copy(self)
        found.partners = limit
        prompts = self.stored.tokens.index["prompt"][self.numbers].astype(np.int64)
        answers = np.roll(self.lengths - prompts, -1)
        found.lengths, found.targets = self.lengths + answers, self.targets + np.roll(self.targets, -1)
        for at in np.nonzero(prompts + answers > limit)[0]:
            shorter = found[int(at)].example
            found.lengths[at], found.targets[at] = len(shorter), shorter.targets
        return found

    def adding(self, more: Callable[[int, Rendered], dict[str, Tensor]]) -> RenderedRows:
        """The same rows with more tensors."""
        found, before = copy(self), self.added
        found.added = lambda at, item: {**({} if before is None else before(at, item)), **more(at, item)}
        return found

    def sources(self) -> Iterator[Row]:
        """The rows as they were read."""
        return (row for _, row in self.stored.rows.read(self.numbers))
