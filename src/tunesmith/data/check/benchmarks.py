"""Text of named benchmarks inside the training rows.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (GPT-3), appendix C: a benchmark item counts as seen
when 13 of its words in a row, case and punctuation folded, stand in the training data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.check.finding import SHOWN, Finding, Instance, Level, agreeing, counted, quoted
from tunesmith.data.check.near import Texts
from tunesmith.data.check.said import rows_with
from tunesmith.data.check.words import Hashes, WordHashes, contains, grams, grams_in_rows, words_of

RUN = 13
SHORTEST = 6
"""Items of fewer words stand in any text by chance; those of 6 to 12 words are looked for whole."""

COMMON = 10
"""A run of 13 words that more items than this share is the benchmark's own wording. Source: ibid., "too common"."""


class Benchmarks:
    """Looks for items of benchmarks in word hashes of training texts.

    Args:
        benchmarks: name and texts of each.
    """

    def __init__(self, benchmarks: Sequence[tuple[str, Iterable[str]]]) -> None:
        self.names = [name for name, _ in benchmarks]
        self.items: list[tuple[int, int]] = []
        self.too_short, self.sizes = Counter[int](), Counter[int]()
        self.short: dict[int, Hashes] = {}
        self.hits: dict[int, tuple[int, int, int]] = {}
        hashes = WordHashes()
        runs: list[Hashes] = []
        owners: list[int] = []
        for number, (_, texts) in enumerate(benchmarks):
            for position, text in enumerate(texts, start=1):
                self.sizes[number] += 1
                words = hashes.of(words_of(text))
                if len(words) < SHORTEST:
                    self.too_short[number] += 1
                    continue
                item = len(self.items)
                self.items.append((number, position))
                if len(words) < RUN:
                    self.short[item] = words
                    continue
                runs.append(np.unique(grams(words, RUN)))
                owners += [item] * len(runs[-1])
        self.runs, self.owner = _sorted(runs, owners)
        starts = [grams(words[:SHORTEST], SHORTEST) for words in self.short.values()]
        self.starts, self.start_owner = _sorted(starts, list(self.short))
        if len(self.runs):
            values, first, times = np.unique(self.runs, return_index=True, return_counts=True)
            self.runs, self.owner = values[times <= COMMON], self.owner[first][times <= COMMON]

    def look(self, texts: NDArray[np.int64], flat: Hashes, offsets: NDArray[np.int64]) -> None:
        """Looks through texts laid end to end; the first hit of each is kept."""
        if not self.items:
            return
        hashes, at = grams_in_rows(flat, offsets, RUN)
        for i in np.flatnonzero(contains(self.runs, hashes)):
            item = int(self.owner[np.searchsorted(self.runs, hashes[i])])
            self._hit(texts, offsets, int(at[i]), item, RUN)
        if not self.short:
            return
        hashes, at = grams_in_rows(flat, offsets, SHORTEST)
        for i in np.flatnonzero(contains(self.starts, hashes)):
            begin = int(at[i])
            end = int(offsets[np.searchsorted(offsets, begin, side="right")])
            low, high = (int(np.searchsorted(self.starts, hashes[i], side=side)) for side in ("left", "right"))
            for item in self.start_owner[low:high].tolist():
                words = self.short[item]
                if begin + len(words) <= end and np.array_equal(flat[begin : begin + len(words)], words):
                    self._hit(texts, offsets, begin, item, len(words))

    def _hit(self, texts: NDArray[np.int64], offsets: NDArray[np.int64], begin: int, item: int, length: int) -> None:
        row = int(np.searchsorted(offsets, begin, side="right")) - 1
        self.hits.setdefault(int(texts[row]), (item, begin - int(offsets[row]), length))

    def flagged(self, texts: Texts) -> list[int]:
        hit = np.isin(texts.unit, list(self.hits)) & texts.columns.training
        return rows_with(hit, texts.columns.number)

    def findings(self, texts: Texts) -> list[Finding]:
        hit = np.flatnonzero(np.isin(texts.unit, list(self.hits)) & texts.columns.training)
        of, skipped = int(texts.columns.training.sum()), self._skipped()
        if not len(hit):
            return self._only_skipped(skipped, of)
        per = Counter(self.items[self.hits[int(texts.unit[row])][0]][0] for row in hit)
        names = ", ".join(f"{self.names[number]} {n:,}" for number, n in per.most_common())
        title = (
            f"{counted(len(hit), 'training row')} {agreeing(len(hit), 'holds', 'hold')} text of a benchmark: {names}"
        )
        instances = tuple(self._instance(texts, int(row)) for row in hit[:SHOWN])
        fix = "`tunesmith data check --fix OUT` drops these rows; with them the benchmark's score says nothing"
        level: Level = "problem"
        return [
            Finding(
                "benchmark-overlap", level, title + (f"; {skipped}" if skipped else ""), len(hit), of, instances, fix
            )
        ]

    def _skipped(self) -> str:
        parts = [
            f"{n:,} of {self.sizes[number]:,} items of {self.names[number]}" for number, n in self.too_short.items()
        ]
        have = agreeing(self.too_short.total(), "has", "have")
        return f"{', '.join(parts)} {have} fewer than {SHORTEST} words and cannot be looked for" if parts else ""

    def _only_skipped(self, skipped: str, of: int) -> list[Finding]:
        if not skipped:
            return []
        fix = "in data.benchmarks name files in which question and answer stand together, so that the items are longer"
        return [Finding("benchmark-overlap", "note", skipped, 0, of, (), fix)]

    def _instance(self, texts: Texts, row: int) -> Instance:
        item, begin, length = self.hits[int(texts.unit[row])]
        number, position = self.items[item]
        prompt, answer = texts.store.texts(row)
        words = [*words_of(prompt), *words_of(answer)][begin : begin + length]
        twin = f"{self.names[number]}:{position}"
        return Instance(
            str(texts.store.source(row)), f"{length} words in a row of {twin}: {quoted(' '.join(words))}", twin
        )


def _sorted(hashes: list[Hashes], owners: list[int]) -> tuple[Hashes, NDArray[np.int64]]:
    flat = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    order = np.argsort(flat, kind="stable")
    return flat[order], np.array(owners, dtype=np.int64)[order]
