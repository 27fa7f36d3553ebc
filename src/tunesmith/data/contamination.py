"""Items that a model is judged on, found in what it was trained on.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (GPT-3), appendix C: an item counts as seen when N of
its words in a row, case and punctuation folded, stand in a training document; N is 13, for short items down to 8; a run
of words that stands in more than ten documents is common wording, and counts for nothing. Test rows of a task share
material with its training rows by design, a table or a source file; they count as seen when 70 % of their runs do
(Chowdhery et al. 2022, "PaLM", section 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tunesmith.data.check.words import Hashes, WordHashes, grams, words_of

RUN, SHORT_RUN = 13, 8
COMMON = 10
SHOWN = 3


class Contamination:
    """Looks for items in training texts.

    Args:
        items: by the name of each set its texts.
        shares: by the name of a set how many of an item's runs must be found, as a share; one of them otherwise.
    """

    def __init__(self, items: Mapping[str, Iterable[str]], shares: Mapping[str, float] = MappingProxyType({})) -> None:
        self.shares = shares
        self.words = WordHashes()
        self.sets = {name: list(texts) for name, texts in items.items()}
        hashes: list[Hashes] = []
        owners: list[tuple[int, int]] = []  # number of the item over all sets, run
        self.items: list[tuple[str, str]] = [(name, text) for name, texts in self.sets.items() for text in texts]
        self.too_short = dict.fromkeys(self.sets, 0)
        for number, (name, text) in enumerate(self.items):
            words = self.words.of(words_of(text))
            run = RUN if len(words) >= RUN else SHORT_RUN
            own = np.unique(grams(words, run))
            if not len(own):
                self.too_short[name] += 1
                continue
            hashes.append(own)
            owners += [(number, run)] * len(own)
        flat = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        order = np.argsort(flat, kind="stable")
        self.runs: Hashes = flat[order]
        self.owner = np.array(owners, dtype=np.int64).reshape(-1, 2)[order]
        self.rows = np.zeros(len(self.runs), dtype=np.int64)
        self.first: dict[int, str] = {}
        values, index, times = np.unique(self.runs, return_index=True, return_counts=True)
        self.values, self.index, self.times = values, index, times

    def look(self, texts: Iterable[tuple[str, str]]) -> None:
        """Looks through training texts, each with the name of where it stands."""
        if not len(self.runs):
            return
        for source, text in texts:
            words = self.words.of(words_of(text))
            for run in (RUN, SHORT_RUN):
                self._mark(source, np.unique(grams(words, run)), run)

    def _mark(self, source: str, found: Hashes, run: int) -> None:
        at = np.searchsorted(self.values, found)
        hit = (at < len(self.values)) & (self.values[np.minimum(at, len(self.values) - 1)] == found)
        for value in at[hit].tolist():
            start = int(self.index[value])
            for place in range(start, start + int(self.times[value])):
                if self.owner[place, 1] == run:
                    self.rows[place] += 1
                    self.first.setdefault(place, source)

    def found(self) -> list[dict[str, Any]]:
        """For each set ``name``, how many items are ``found`` ``of`` all, how many are ``too_short`` to be looked for,
        and ``examples`` with the ``item``'s number from 1, its ``text`` and the ``source`` of the training row."""
        common = np.zeros(len(self.runs), dtype=bool)
        for start, times in zip(self.index.tolist(), self.times.tolist(), strict=True):
            common[start : start + times] = times > COMMON
        seen = np.flatnonzero((self.rows > 0) & (self.rows <= COMMON) & ~common)
        places: dict[int, int] = {}
        for place in seen.tolist():
            places.setdefault(int(self.owner[place, 0]), place)
        counts = [
            np.bincount(self.owner[chosen, 0], minlength=len(self.items))
            for chosen in (seen, np.flatnonzero(~common & (self.rows <= COMMON)))
        ]
        for number in [*places]:
            share = self.shares.get(self.items[number][0], 0.0)
            if counts[0][number] < share * counts[1][number]:
                del places[number]
        result, start = [], 0
        for name, texts in self.sets.items():
            own = [number for number in sorted(places) if start <= number < start + len(texts)]
            examples = [
                {
                    "item": number - start + 1,
                    "text": texts[number - start][:200],
                    "source": self.first[places[number]],
                }
                for number in own[:SHOWN]
            ]
            numbers = {"found": len(own), "of": len(texts), "too_short": self.too_short[name]}
            result.append({"name": name, **numbers, "examples": examples})
            start += len(texts)
        return result


def told(found: Sequence[dict[str, Any]]) -> list[str]:
    """What the verdict says: a clause for each set of which items were trained on."""
    return [
        f"{entry['found']} of {entry['of']} {entry['name']} stand in the training data"
        for entry in found
        if entry["found"]
    ]
