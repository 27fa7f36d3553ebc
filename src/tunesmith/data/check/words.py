"""Words of a text in any script, their 64-bit hashes, and hashes of runs of words (n-grams)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Signs that change the meaning (C and C++, $5 and €5, a < b and a > b) count as words; punctuation does not.
_SIGNS = "$+<=>^%\u00a2-\u00a5\u00b1\u00d7\u00f7\u20a0-\u20bf\u2190-\u22ff\u2600-\u27bf\U0001f300-\U0001faff"
_PLAIN = re.compile(r"\w+|[$+<=>^%]")
# Thai, Lao, Myanmar, Khmer, kana and Han are written without spaces: there every character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_ANY = re.compile(rf"[{_UNSPACED}{_SIGNS}]|[^\W{_UNSPACED}]+")

_CACHED = 400_000
_SEED = 20_240_229
_MULTIPLIERS: Hashes = np.random.default_rng(_SEED).integers(1, 2**63, size=64, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


def words_of(text: str) -> list[str]:
    """Case-folded words without punctuation."""
    folded = text.casefold()
    return (_PLAIN if folded.isascii() else _ANY).findall(folded)


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b; the same on every machine, unlike ``hash``."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


class WordHashes(dict[str, int]):
    """Hashes of words, remembered; forgotten all at once when there are too many, so that memory stays bounded."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED:
            self.clear()
        value = self[word] = hash_of(word)
        return value

    def of(self, words: Sequence[str]) -> Hashes:
        """uint64 ``[words]``."""
        return np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))


def grams(hashes: Hashes, n: int) -> Hashes:
    """Hashes of every run of ``n`` words: uint64 ``[words - n + 1]``, or empty.

    Multilinear hashing modulo 2⁶⁴ (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = hashes[:count] * _MULTIPLIERS[0]
    for i in range(1, n):
        total += hashes[i : i + count] * _MULTIPLIERS[i]
    # The lowest bits of a product depend on low bits alone; fold the high half in.
    return total ^ (total >> np.uint64(32))


def contains(sorted_hashes: Hashes, wanted: Hashes) -> NDArray[np.bool_]:
    """Which of ``wanted`` stand in ``sorted_hashes``: bool ``[wanted]``."""
    if not len(sorted_hashes):
        return np.zeros(len(wanted), dtype=bool)
    at = np.searchsorted(sorted_hashes, wanted)
    return sorted_hashes[np.minimum(at, len(sorted_hashes) - 1)] == wanted


def laid_out(rows: Iterable[Hashes]) -> tuple[Hashes, NDArray[np.int64]]:
    """Rows end to end, and where each begins: uint64 ``[total]`` and int64 ``[rows + 1]``."""
    kept = list(rows)
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in kept], out=offsets[1:])
    return (np.concatenate(kept) if kept else np.empty(0, dtype=np.uint64)), offsets


def grams_in_rows(flat: Hashes, offsets: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the n-grams that stay within one row, and the positions at which they begin."""
    row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    count = max(len(flat) - n + 1, 0)
    inside = np.flatnonzero(row_of[:count] == row_of[n - 1 : n - 1 + count])
    return grams(flat, n)[inside], inside
