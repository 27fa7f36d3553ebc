"""Rows that training would refuse or leave out, told as findings and with the same words of what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.data.check import Finding, Instance
from tunesmith.data.clean import first_of_equals
from tunesmith.data.ingest import Ingested
from tunesmith.data.row_file import EMPTINESS, RowFile
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import Stored

SHOWN = 20


@dataclass(frozen=True)
class Splits:
    """Numbers of the rows that are trained on, and of each held-out file or part."""

    train: np.ndarray
    held: dict[str, np.ndarray]


@dataclass
class Defects:
    """Findings, and the training rows that a cleaned file would not have.

    Attributes:
        dropped: why each row would go, the first reason that was found.
    """

    rows: RowFile
    findings: list[Finding]
    dropped: dict[int, str]

    def add(self, finding: Finding, dropped: Sequence[int] | np.ndarray = (), reason: str = "") -> None:
        self.findings.append(finding)
        for number in dropped:
            self.dropped.setdefault(int(number), reason)

    def instances(self, numbers: np.ndarray, what: Callable[[int], str], other: Callable[[int], int] | None = None):
        """The first rows as instances; ``other`` gives the number of a row's twin."""
        return tuple(
            Instance(
                str(self.rows[int(number)].source),
                what(int(number)),
                str(self.rows[other(int(number))].source) if other else "",
            )
            for number in numbers[:SHOWN]
        )


def find_defects(ingested: Ingested, splits: Splits, spec: DataSpec) -> Defects:
    """Rows that cannot be read, say nothing, stand twice, or stand on both sides."""
    defects = Defects(ingested.rows, [], {})
    if ingested.errors.count:
        defects.add(_wrong(ingested, len(ingested.rows)))
    _find_empty(defects, splits, spec)
    _find_duplicates(defects, splits.train, spec)
    for name, held in splits.held.items():
        _find_overlap(defects, splits.train, held, name, spec)
    return defects


def _wrong(ingested: Ingested, right: int) -> Finding:
    errors = ingested.errors
    shown = [text.partition(": ") for text in errors.shown]
    return Finding(
        "wrong-rows",
        "problem",
        f"{_rows(errors.count)} cannot be read",
        errors.count,
        right + errors.count,
        tuple(Instance(where, what) for where, _, what in shown),
        "; ".join(errors.fixes) or "correct these lines; --fix leaves them out",
    )


def _find_empty(defects: Defects, splits: Splits, spec: DataSpec) -> None:
    everything = np.concatenate([splits.train, *splits.held.values()])
    kinds = defects.rows.index["emptiness"]
    empty = everything[kinds[everything] > 0]
    if len(empty):
        level = "problem" if spec.empty == "error" else "warning"
        found = Finding(
            "empty",
            level,
            f"{_rows(len(empty))} with an empty answer, prompt or text",
            len(empty),
            len(everything),
            defects.instances(empty, lambda number: EMPTINESS[kinds[number]]),
            "fill them in; data.empty: drop or --fix leaves them out",
        )
        defects.add(found, splits.train[kinds[splits.train] > 0], "empty")


def _find_duplicates(defects: Defects, train: np.ndarray, spec: DataSpec) -> None:
    first = train[first_of_equals(defects.rows.index["key"][train])] if len(train) else train
    doubled = train[first != train]
    if len(doubled):
        twin = dict(zip(train.tolist(), first.tolist(), strict=True))
        found = Finding(
            "duplicates",
            "problem" if spec.duplicates == "error" else "warning",
            f"{_rows(len(doubled))} of the training data {_s(doubled, 'stands', 'stand')} there a second time",
            len(doubled),
            len(train),
            defects.instances(doubled, lambda _: "the same row", twin.__getitem__),
            "data.duplicates: drop (the default) or --fix leaves out all but the first",
        )
        defects.add(found, doubled, "duplicate")


def _find_overlap(defects: Defects, train: np.ndarray, held: np.ndarray, name: str, spec: DataSpec) -> None:
    index = defects.rows.index
    shared = train[np.isin(index["prompt"][train], index["prompt"][held])]
    if not len(shared):
        return
    exact = int(np.isin(index["key"][shared], index["key"][held]).sum())
    twins = {index["prompt"][number]: int(number) for number in held[::-1]}
    found = Finding(
        "leakage",
        "problem" if spec.overlap == "error" else "warning",
        f"{_rows(len(shared))} of the training data {_s(shared, 'asks', 'ask')} what {name} asks too ({exact:,} the "
        "same row, the others the same prompt after folding case and white space)",
        len(shared),
        len(train),
        defects.instances(shared, lambda _: "the same prompt", lambda number: twins[index["prompt"][number]]),
        "data.overlap: drop (the default) or --fix leaves them out of training",
    )
    defects.add(found, shared, f"stands in {name}")


def find_unfit(defects: Defects, stored: Stored, splits: Splits, limit: int | None, spec: DataSpec) -> None:
    """Rows that the template refuses, that are too long, or in which nothing is trained on."""
    everything = np.concatenate([splits.train, *splits.held.values()])
    index = stored.tokens.index
    refused = everything[index["bad"][everything] & (stored.rows.index["emptiness"][everything] == 0)]
    if len(refused):
        shown = defects.instances(refused, lambda number: stored.tokens.bad[number])
        fix = "change these rows, or choose another data.template; --fix leaves them out"
        found = Finding(
            "template",
            "problem",
            f"the template refuses {_rows(len(refused))}",
            len(refused),
            len(everything),
            shown,
            fix,
        )
        defects.add(found, np.intersect1d(refused, splits.train), "refused by the template")
    over = everything[index["length"][everything] > limit] if limit is not None else everything[:0]
    if len(over):
        found = Finding(
            "overlong",
            "problem" if spec.overlong == "error" else "warning",
            f"{_rows(len(over))} longer than {limit:,} tokens ({index['targets'][over].sum():,} tokens to train on)",
            len(over),
            len(everything),
            defects.instances(over, lambda number: f"{index['length'][number]:,} tokens"),
            "raise data.max_length where the model allows it, or set data.overlong: drop or truncate; --fix leaves "
            "them out",
        )
        defects.add(found, np.intersect1d(over, splits.train), f"longer than {limit} tokens")
    aimless = splits.train[(index["targets"][splits.train] == 0) & ~index["bad"][splits.train]]
    if len(aimless):
        found = Finding(
            "no-targets",
            "problem" if len(aimless) == len(splits.train) else "warning",
            f"in {_rows(len(aimless))} nothing is trained on",
            len(aimless),
            len(splits.train),
            defects.instances(aimless, lambda _: "every answer has the weight 0"),
            "give at least one answer a weight above 0",
        )
        defects.add(found, aimless, "nothing is trained on")


def _s(numbers: np.ndarray, one: str, many: str) -> str:
    return one if len(numbers) == 1 else many


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
