"""Rows that cannot be used as they are: each is found, counted with its targets, and dropped, cut or refused.

Rows are named by their number among the stored ones; each function takes an ascending int64 array of them and gives
back those that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.base import InputError
from tunesmith.data.record import RowErrors
from tunesmith.data.row import SAME_ANSWERS
from tunesmith.data.row_file import EMPTINESS, RowFile
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import Stored
from tunesmith.data.truncate import truncated

CUT = "cut at the end of the answer"
"""Such a row is used; only its cut targets are lost."""


@dataclass(frozen=True)
class Lost:
    """Training rows that are not used, by reason."""

    reason: str
    rows: int
    target_tokens: int
    example: str


class Losses:
    """Counts rows that are not used, and what would have been trained on in them.

    Attributes:
        numbers: for each reason the rows.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}
        self._targets: dict[str, int] = {}

    def add(self, reason: str, numbers: np.ndarray, targets: int | None = None) -> None:
        """
        Args:
            targets: how many targets are lost, when it is not all that the rows have.
        """
        if len(numbers):
            self.numbers.setdefault(reason, []).extend(numbers.tolist())
            if targets is not None:
                self._targets[reason] = self._targets.get(reason, 0) + targets

    def summary(self, stored: Stored) -> list[Lost]:
        return [
            Lost(
                reason,
                0 if reason == CUT else len(rows),
                self._targets.get(reason, int(stored.targets(np.array(rows)).sum())),
                str(stored.rows.source(rows[0])),
            )
            for reason, rows in self.numbers.items()
        ]


def without_duplicates(numbers: np.ndarray, rows: RowFile, spec: DataSpec, lost: Losses) -> np.ndarray:
    if spec.duplicates == "keep":
        return numbers
    earlier = numbers[first_of_equals(rows.column("key", numbers))]
    doubled = earlier != numbers
    if spec.duplicates == "error":
        errors = RowErrors()
        for number, twin in zip(numbers[doubled], earlier[doubled], strict=True):
            errors.add(rows.source(number), f"the same row as {rows.source(twin)}")
        errors.raise_any("remove them, or set data.duplicates: drop or keep")
    lost.add("duplicate", numbers[doubled])
    return numbers[~doubled]


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """For each place of ``keys`` the first place that holds the same key."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which]


def without_overlap(numbers: np.ndarray, held: np.ndarray, rows: RowFile, spec: DataSpec, lost: Losses) -> np.ndarray:
    """Training rows that share their prompt, or their group, with no held-out row."""
    if spec.overlap == "keep" or not len(held):
        return numbers
    prompts = np.isin(rows.column("prompt", numbers), rows.column("prompt", held))
    groups = np.zeros(len(numbers), bool)
    if spec.group is not None:
        groups = np.isin(rows.column("group", numbers), rows.column("group", held)) & ~prompts
    if spec.overlap == "error":
        errors = RowErrors()
        for number in numbers[prompts | groups]:
            errors.add(rows.source(number), _twin(int(number), held, rows))
        errors.raise_any("remove them from training, or set data.overlap: drop or keep")
    lost.add("stands in the held-out rows", numbers[prompts])
    lost.add("its group stands in the held-out rows", numbers[groups])
    kept = numbers[~(prompts | groups)]
    if not len(kept):
        raise InputError(
            "every training row also stands in the held-out rows",
            where="data.overlap",
            fix="use other rows for validation and test; data.overlap: keep trains on them all the same",
        )
    return kept


def _twin(number: int, held: np.ndarray, rows: RowFile) -> str:
    for name, what in (("prompt", "the same prompt"), ("group", "the same group")):
        same = held[rows.column(name, held) == rows.index[name][number]]
        if len(same):
            return f"{what} as {rows.source(same[0])}, which is held out"
    raise ValueError("this row overlaps with no held-out row")


def without_empty(
    numbers: np.ndarray, rows: RowFile, spec: DataSpec, *, answers_optional: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that say something, and those that do not."""
    kinds = rows.column("emptiness", numbers).copy()
    if answers_optional:
        kinds[kinds == EMPTINESS.index("the answer is empty")] = 0
    empty = numbers[kinds > 0]
    if spec.empty == "error":
        errors = RowErrors()
        for number, kind in zip(empty, kinds[kinds > 0], strict=True):
            errors.add(rows.source(number), EMPTINESS[kind])
        errors.raise_any("fill them in, or leave them out with data.empty: drop")
    return numbers[kinds == 0], empty


def without_equal_pairs(numbers: np.ndarray, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The rows that teach something, and pairs whose answers are one."""
    equal = stored.tokens.index["bad"][numbers].copy()
    for at in np.nonzero(equal)[0]:
        equal[at] = stored.tokens.bad[int(numbers[at])] == SAME_ANSWERS
    return numbers[~equal], numbers[equal]


def refuse_unrendered(numbers: np.ndarray, stored: Stored) -> None:
    """Raises InputError when the template refuses any of these rows."""
    errors = RowErrors()
    for number in numbers[stored.tokens.index["bad"][numbers]]:
        errors.add(stored.rows.source(number), stored.tokens.bad[int(number)])
    errors.raise_any("change these rows, or choose another data.template")


def within_length(
    numbers: np.ndarray, limit: int, own: bool, stored: Stored, spec: DataSpec, lost: Losses
) -> np.ndarray:
    """The rows of at most ``limit`` tokens, and those that can be cut to it where the recipe says so.

    Args:
        own: whether the limit is the model's own, which no setting can raise.
    """
    lengths = stored.reach(numbers)
    over = lengths > limit
    if spec.overlong == "error":
        errors = RowErrors()
        for number, length in zip(numbers[over], lengths[over], strict=True):
            errors.add(stored.rows.source(number), f"{length} tokens, {length - limit} over the limit of {limit}")
        raised = "the model has no more positions: " if own else "raise data.max_length, or "
        errors.raise_any(raised + "set data.overlong: drop or truncate")
    if spec.overlong == "drop":
        lost.add("overlong", numbers[over])
        return numbers[~over]
    kept = ~over
    for at in np.nonzero(over)[0]:
        shorter = truncated(stored.rendered(numbers[at]), limit)
        kept[at] = shorter is not None
        if shorter is None:
            lost.add("no answer left within max_length", numbers[at : at + 1])
        elif shorter.cut_targets:
            lost.add(CUT, numbers[at : at + 1], shorter.cut_targets)
    return numbers[kept]


def with_targets(numbers: np.ndarray, stored: Stored, lost: Losses) -> np.ndarray:
    """Leaves out rows in which nothing is trained on, because every answer of theirs has the weight 0."""
    aimless = stored.targets(numbers) == 0
    lost.add("no answer with a weight", numbers[aimless])
    if aimless.all():
        raise InputError(
            "nothing would be trained on: no row has a target token",
            where="data.train",
            fix="give at least one answer the weight 1",
        )
    return numbers[~aimless]
