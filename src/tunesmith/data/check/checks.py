"""All checks over one stream of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from tunesmith.data.check.benchmarks import Benchmarks
from tunesmith.data.check.contradictions import contradictory_answers
from tunesmith.data.check.degenerate import Degenerate
from tunesmith.data.check.encoding import Encoding
from tunesmith.data.check.finding import Finding
from tunesmith.data.check.labels import LabelBalance
from tunesmith.data.check.language import Languages
from tunesmith.data.check.near import Comparison, Near, Texts
from tunesmith.data.check.near_report import near_findings, near_flagged
from tunesmith.data.check.personal import PersonalData
from tunesmith.data.check.preference import PreferencePairs
from tunesmith.data.check.said import Store, said_by
from tunesmith.data.row import Row

LEVELS = ("problem", "warning", "note")


class Checks:
    """Looks through rows as they come; what compares rows is done when the findings are asked for.

    Rows of the splits ``validation`` and ``test`` are held out; rows of any other split, or of a file that is named
    instead, are training rows. In memory a row takes about 250 bytes (a signature of 192 and its columns); the texts
    stand in a temporary file. Exact duplicates, overlap, empty answers and lengths are found elsewhere.

    Args:
        benchmarks: name and texts of each benchmark that training rows must not hold.
        near_threshold: Jaccard similarity of word n-grams from which two rows are near duplicates.
        seed: of the MinHash permutations.
    """

    def __init__(
        self,
        *,
        benchmarks: Sequence[tuple[str, Iterable[str]]] = (),
        near_threshold: float = 0.8,
        seed: int = 0,
    ) -> None:
        self._threshold, self._seed = near_threshold, seed
        self._store = Store()
        self._benchmarks = Benchmarks(benchmarks)
        self._languages = Languages()
        self._labels = LabelBalance()
        self._degenerate = Degenerate(self._labels)
        self._personal, self._encoding, self._pairs = PersonalData(), Encoding(), PreferencePairs()
        self._by_row = (self._labels, self._degenerate, self._personal, self._encoding, self._pairs)

    def add(self, row: Row, split: str, number: int) -> None:
        """Takes one more row; after `findings` or `flagged` no more can be added.

        Raises:
            InputError: when there is no room for the temporary file.
        """
        if "_compared" in self.__dict__:
            raise RuntimeError("rows cannot be added after the findings were asked for")
        said = said_by(row, split, number)
        for check in self._by_row:
            check.add(said)
        self._languages.add(said)
        self._store.add(said)

    def findings(self) -> list[Finding]:
        """Everything that was found, problems first."""
        texts, near = self._compared
        found = [
            *near_findings(near, texts, self._threshold),
            *self._benchmarks.findings(texts),
            *contradictory_answers(self._store, texts.columns),
            *(finding for check in self._by_row for finding in check.findings()),
            *self._languages.findings(self._store),
        ]
        return sorted(found, key=lambda finding: LEVELS.index(finding.level))

    def flagged(self) -> dict[str, list[int]]:
        """For each kind that `--fix` drops the numbers of the training rows concerned."""
        texts, near = self._compared
        flagged = {
            **near_flagged(near, texts),
            "benchmark-overlap": self._benchmarks.flagged(texts),
            "degenerate-answers": self._degenerate.flagged(),
        }
        return {kind: numbers for kind, numbers in flagged.items() if numbers}

    @cached_property
    def _compared(self) -> tuple[Texts, Near]:
        texts = Texts(self._store, self._store.columns())
        comparison = Comparison(texts, self._threshold, self._seed)
        for batch, flat, offsets in texts.batches():
            self._benchmarks.look(batch, flat, offsets)
            comparison.sign(batch, flat, offsets)
        return texts, comparison.run()
