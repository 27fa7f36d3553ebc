"""Where validation and test rows come from: files of their own, or rows held back from training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tunesmith.base import InputError
from tunesmith.data.clean import without_empty
from tunesmith.data.record import RowErrors
from tunesmith.data.row_file import RowFile
from tunesmith.data.spec import DataSpec
from tunesmith.data.split import Belonging, hold_back, hold_back_test


@dataclass
class HeldOut:
    """Numbers of the rows that are not trained on, and where they came from, in words."""

    test: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    validation: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    test_from: str = ""
    validation_from: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What is to be held out.

    Attributes:
        wants_test: whether rows are held back for a verdict when no test is named.
        answers_optional: whether a row may leave its answer empty.
    """

    spec: DataSpec
    seed: int
    wants_test: bool
    answers_optional: bool = False

    def split(self, numbers: np.ndarray, files: Mapping[str, np.ndarray], rows: RowFile) -> tuple[np.ndarray, HeldOut]:
        """The rows that are trained on, and those that are held out.

        Args:
            numbers: training rows.
            files: the rows of the files named for `validation` and `test`.

        Raises:
            InputError: when nothing is left on one side.
        """
        spec, held = self.spec, HeldOut()
        if isinstance(spec.test, str) and spec.test != "auto":
            held.test, held.test_from = self._said(files["test"], spec.test, "test", rows, held), spec.test
        elif isinstance(spec.test, float):
            share = _share(spec.test, "data.test")
            numbers, held.test = self._held(numbers, rows, share, "data.test")
            held.test_from = f"{spec.test:.0%} of the training rows, held back before training"
        elif self.wants_test:
            chosen = hold_back_test(self._belonging(numbers, rows), seed=self.seed)
            numbers, held.test = numbers[~chosen], numbers[chosen]
            held.test_from = f"{len(held.test)} training rows, held back before training"
        if isinstance(spec.validation, str):
            held.validation = self._said(files["validation"], spec.validation, "validation", rows, held)
            held.validation_from = spec.validation
            self._keep_apart(held, rows)
        elif isinstance(spec.validation, float):
            share = _share(spec.validation, "data.validation")
            numbers, held.validation = self._held(numbers, rows, share, "data.validation")
            held.validation_from = f"{share:.0%} of the training rows, held back before training"
        return numbers, held

    def _held(self, numbers: np.ndarray, rows: RowFile, share: float, key: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = hold_back(self._belonging(numbers, rows), share, seed=self.seed, key=key)
        return numbers[~chosen], numbers[chosen]

    def _belonging(self, numbers: np.ndarray, rows: RowFile) -> Belonging:
        return Belonging(
            rows.column("prompt", numbers),
            rows.column("group", numbers) if self.spec.group is not None else None,
            rows.column("stratum", numbers) if self.spec.stratify is not None else None,
        )

    def _said(self, numbers: np.ndarray, path: str, role: str, rows: RowFile, held: HeldOut) -> np.ndarray:
        kept, empty = without_empty(numbers, rows, self.spec, answers_optional=self.answers_optional)
        if len(empty):
            held.notes.append(f"{left_out(len(empty), path)}: empty, the first at {rows.source(empty[0])}")
        if not len(kept):
            raise InputError("every row is empty", where=path, fix=f"name another file in data.{role}")
        return kept

    def _keep_apart(self, held: HeldOut, rows: RowFile) -> None:
        """The rows that choose the checkpoint must not be those that judge it."""
        if self.spec.overlap == "keep" or not len(held.test):
            return
        prompts, judged = rows.column("prompt", held.validation), rows.column("prompt", held.test)
        shared = np.isin(prompts, judged)
        if self.spec.overlap == "error":
            errors = RowErrors()
            for number, prompt in zip(held.validation[shared], prompts[shared], strict=True):
                twin = rows.source(held.test[judged == prompt][0])
                errors.add(rows.source(number), f"the same prompt as {twin}, which is a test row")
            errors.raise_any("remove them from validation, or set data.overlap: drop or keep")
        held.validation = held.validation[~shared]
        if not len(held.validation):
            raise InputError(
                "every validation row also stands in the test rows",
                where="data.validation",
                fix="name other rows, or a fraction such as 0.1",
            )
        if shared.any():
            count = int(shared.sum())
            held.notes.append(f"{left_out(count, 'validation')}: the test has the same prompts")


def left_out(count: int, where: str) -> str:
    return f"1 row of {where} was left out" if count == 1 else f"{count} rows of {where} were left out"


def _share(value: float, key: str) -> float:
    if not 0 < value < 1:
        raise InputError(f"{value} is not a fraction between 0 and 1", where=key, fix="use 0.1 for a tenth, or a path")
    return value
