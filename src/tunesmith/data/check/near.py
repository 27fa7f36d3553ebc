"""Near duplicates: MinHash signatures over pairs of words, candidates by banding, every candidate verified exactly.

Sources: Broder 1997, "On the resemblance and containment of documents"; Lee et al. 2022, "Deduplicating Training Data
Makes Language Models Better" (near duplicates by MinHash, then a check of every candidate).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module without types)

from tunesmith.data.check.said import Columns, Store
from tunesmith.data.check.words import Hashes, WordHashes, contains, grams, grams_in_rows, laid_out, words_of

BANDS, ROWS_PER_BAND = 12, 4
"""A pair of Jaccard similarity 0.8 shares at least one of 12 bands of 4 with probability 0.998; 192 bytes a text."""

WINDOW = 16
"""Texts of one bucket that each text is compared with, so that a bucket of n texts costs n × 16 and not n²."""

SLACK = 0.15
"""A candidate whose estimate lies further below the threshold is not verified: three standard errors of 48 values."""

FAILURES = 8
"""Candidates of a text that may fail verification before it is only compared with texts that failed less often."""

SAMPLE = 2_000
TEMPLATE_ROWS, TEMPLATE_SHARE = 50, 0.05
TEMPLATE_WORDS = 5
"""A run of 5 words that stands in at least 50 and 5 % of the sampled texts is a template, not content."""

ANSWER_SLACK = 0.2
SHORT_ANSWER = 20
"""Answers under 20 words (labels, numbers, queries) must agree as closely as the whole row; longer ones by 0.2 less."""

_START, _END = np.array([1], dtype=np.uint64), np.array([2], dtype=np.uint64)
_BATCH = 1_000
_NONE = -1


@dataclass(frozen=True)
class Near:
    """Texts that nearly repeat another. A text stands for all rows that are the same after folding case and space.

    Attributes:
        unit: text of each row: int64 ``[rows]``.
        clusters: texts of training rows by group, each with the text of the earliest row first.
        leaks: texts of training rows, each with a held-out text that it is near to.
    """

    unit: NDArray[np.int64]
    clusters: list[list[int]]
    leaks: dict[int, int]


class Texts:
    """The distinct texts of a store, ordered by hash, so that nothing depends on the order of rows."""

    def __init__(self, store: Store, columns: Columns) -> None:
        self.store, self.columns = store, columns
        self.hashes, self.first, self.unit = np.unique(columns.text, return_index=True, return_inverse=True)
        count = len(self.first)
        self.first_training = _first_row(self.unit, columns.training, count)
        self.first_held = _first_row(self.unit, ~columns.training, count)
        self.words = WordHashes()
        self.template = self._template()
        self.payload = lru_cache(maxsize=4096)(self._payload)

    def __len__(self) -> int:
        return len(self.first)

    def parts(self, text: int) -> tuple[Hashes, Hashes]:
        """Word hashes of prompt and answer."""
        prompt, answer = self.store.texts(int(self.first[text]))
        return self.words.of(words_of(prompt)), self.words.of(words_of(answer))

    def batches(self) -> Iterator[tuple[NDArray[np.int64], Hashes, NDArray[np.int64]]]:
        """Indices of texts, their word hashes laid end to end, and where each begins."""
        # In the order of rows, because reading the store in the order of hashes would jump through the file.
        order = np.argsort(self.first)
        for begin in range(0, len(self), _BATCH):
            batch = order[begin : begin + _BATCH]
            yield batch, *laid_out(self.whole(int(text)) for text in batch)

    def whole(self, text: int) -> Hashes:
        """Word hashes of prompt and answer in one."""
        return self.words.of(words_of("\n".join(self.store.texts(int(self.first[text])))))

    def _template(self) -> Hashes:
        sampled = [np.unique(grams(self.whole(i), TEMPLATE_WORDS)) for i in range(min(SAMPLE, len(self)))]
        if not sampled:
            return np.empty(0, dtype=np.uint64)
        values, rows = np.unique(np.concatenate(sampled), return_counts=True)
        return values[rows >= max(TEMPLATE_ROWS, TEMPLATE_SHARE * len(sampled))]

    def without_template(self, flat: Hashes, offsets: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
        """Rows end to end without the words that a template covers; a row that is all template stays whole."""
        if not len(self.template):
            return flat, offsets
        hashes, at = grams_in_rows(flat, offsets, TEMPLATE_WORDS)
        covered = np.zeros(len(flat), dtype=bool)
        for start in at[contains(self.template, hashes)]:
            covered[start : start + TEMPLATE_WORDS] = True
        left = np.add.reduceat(np.append(~covered, False), offsets[:-1]) if len(offsets) > 1 else np.empty(0)
        row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        kept = ~covered | (left[row_of] == 0)
        ends = np.concatenate([[0], np.cumsum(kept)])
        return flat[kept], ends[offsets]

    def _payload(self, text: int) -> tuple[Hashes, Hashes]:
        """Word hashes of the whole text without template, and of the answer."""
        prompt, answer = self.parts(text)
        whole, offsets = laid_out([np.concatenate([prompt, answer])])
        return self.without_template(whole, offsets)[0], answer


def _first_row(unit: NDArray[np.int64], wanted: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Index of the first wanted row of each text, or -1: int64 ``[texts]``."""
    first = np.full(count, _NONE, dtype=np.int64)
    rows = np.flatnonzero(wanted)[::-1]
    first[unit[rows]] = rows
    return first


def shingles(words: Hashes, n: int) -> Hashes:
    """Distinct n-grams; the ends count as words, so that a change of the last word costs as much as any other."""
    padded = np.concatenate([_START, words, _END])
    return np.unique(grams(padded, min(n, len(padded))))


def jaccard(a: Hashes, b: Hashes) -> float:
    """Similarity of two texts by their n-grams: 5 words for long ones, 3 from 20 words on, 2 for short ones."""
    shorter = min(len(a), len(b))
    n = 5 if shorter >= 60 else 3 if shorter >= 20 else 2
    left, right = shingles(a, n), shingles(b, n)
    both = len(np.intersect1d(left, right, assume_unique=True))
    return both / max(len(left) + len(right) - both, 1)


class Comparison:
    """Finds near texts among training rows, and between training and held-out rows."""

    def __init__(self, texts: Texts, threshold: float, seed: int) -> None:
        self.texts, self.threshold, self.seed = texts, threshold, seed
        self.parent = np.arange(len(texts))
        self.leaks: dict[int, int] = {}
        self.failed = np.zeros(len(texts), dtype=np.uint8)
        self.signatures = np.zeros((len(texts), BANDS * ROWS_PER_BAND), dtype=np.uint32)
        self.usable = np.zeros(len(texts), dtype=bool)
        self.is_training = texts.first_training != _NONE
        self.is_held = texts.first_held != _NONE
        self.prompt = texts.columns.prompt[texts.first] if len(texts) else texts.columns.prompt

    def run(self) -> Near:
        """Compares the texts that were signed."""
        for left, right in self._candidates():
            self._verify(left, right)
        return Near(self.texts.unit, self._clusters(), dict(sorted(self.leaks.items())))

    def sign(self, batch: NDArray[np.int64], flat: Hashes, offsets: NDArray[np.int64]) -> None:
        """Computes the signatures of a batch of texts, whose word hashes are laid end to end."""
        flat, offsets = self.texts.without_template(flat, offsets)
        self.usable[batch] = np.diff(offsets) > 0
        padded, ends = _with_ends(flat, offsets)
        pairs, at = grams_in_rows(padded, ends, 2)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            pairs, np.searchsorted(at, ends).astype(np.uint64), num_perm=BANDS * ROWS_PER_BAND, seed=self.seed
        )
        self.signatures[batch] = matrix.to_rows()

    def _candidates(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs of texts that share a band and whose signatures agree about as much as the threshold asks."""
        worth, signatures = np.flatnonzero(self.usable), self.signatures
        for band in range(BANDS):
            columns = signatures[worth, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].astype(np.uint64)
            keys = np.zeros(len(worth), dtype=np.uint64)
            for column in columns.T:
                keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(29)
            order = np.argsort(keys, kind="stable")
            for step in range(1, WINDOW + 1):
                same = np.flatnonzero(keys[order[step:]] == keys[order[:-step]])
                if not len(same):
                    break
                for begin in range(0, len(same), 50_000):
                    some = same[begin : begin + 50_000]
                    left, right = worth[order[some]], worth[order[some + step]]
                    agree = (signatures[left] == signatures[right]).mean(axis=1) >= self.threshold - SLACK
                    yield left[agree], right[agree]

    def _verify(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        hopeless = (self.failed[left] >= FAILURES) & (self.failed[right] >= FAILURES)
        worth = ~hopeless & (self.is_training[left] | self.is_training[right])
        for a, b in zip(left[worth].tolist(), right[worth].tolist(), strict=True):
            leaks = [(t, h) for t, h in ((a, b), (b, a)) if self._may_leak(t, h)]
            joins = self.is_training[a] and self.is_training[b] and self._root(a) != self._root(b)
            if not (leaks or joins):
                continue
            if not self._near(a, b):
                for text in (a, b):
                    self.failed[text] = min(int(self.failed[text]) + 1, 255)
                continue
            self.leaks.update(leaks)
            if joins:
                low, high = sorted((self._root(a), self._root(b)))
                self.parent[high] = low

    def _may_leak(self, training: int, held: int) -> bool:
        """The same prompt on both sides is overlap, which is found and dropped elsewhere."""
        known = training in self.leaks or not (self.is_training[training] and self.is_held[held])
        return not known and self.prompt[training] != self.prompt[held] and not self.is_held[training]

    def _near(self, a: int, b: int) -> bool:
        (whole_a, answer_a), (whole_b, answer_b) = self.texts.payload(a), self.texts.payload(b)
        if not len(answer_a) and not len(answer_b):
            return jaccard(whole_a, whole_b) >= self.threshold
        shorter = min(len(answer_a), len(answer_b))
        wanted = self.threshold if shorter < SHORT_ANSWER else self.threshold - ANSWER_SLACK
        return jaccard(answer_a, answer_b) >= wanted and jaccard(whole_a, whole_b) >= self.threshold

    def _root(self, text: int) -> int:
        while (above := int(self.parent[text])) != text:
            self.parent[text] = self.parent[above]
            text = above
        return text

    def _clusters(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for text in np.flatnonzero(self.is_training & (self.parent != np.arange(len(self.parent)))).tolist():
            members.setdefault(self._root(text), []).append(text)
        earliest = self.texts.first_training
        grouped = [sorted([root, *others], key=lambda text: int(earliest[text])) for root, others in members.items()]
        return sorted(grouped, key=lambda group: int(earliest[group[0]]))


def _with_ends(flat: Hashes, offsets: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Each row between a start and an end mark."""
    rows = len(offsets) - 1
    ends = offsets + 2 * np.arange(rows + 1)
    padded = np.empty(len(flat) + 2 * rows, dtype=np.uint64)
    inner = np.ones(len(padded), dtype=bool)
    for marks, at in ((_START, ends[:-1]), (_END, ends[1:] - 1)):
        padded[at] = marks[0]
        inner[at] = False
    padded[inner] = flat
    return padded, ends
