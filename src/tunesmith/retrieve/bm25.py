"""BM25 (Robertson et al. 1995; in Lucene's form, Kamphuis et al. 2020) through bm25s (Lù 2024)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

K1, B = 1.5, 0.75
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_TOKEN = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def words(text: str) -> list[str]:
    """Words in lower case, numbers and single letters too; one character each in scripts without spaces.

    There is no list of words to pass over: BM25 itself gives little weight to those that stand everywhere.
    """
    return _TOKEN.findall(text.lower())


class Bm25:
    """Scores by shared words.

    Args:
        texts: what is searched, at least one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from bm25s import BM25

        self._size = len(texts)
        self._index: Any = None
        found = [words(text) for text in texts]
        if any(found):
            self._index = BM25(method="lucene", k1=K1, b=B)
            self._index.index(found, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """fp32 ``[texts]``; words that stand in no text add nothing."""
        index = self._index
        known = [] if index is None else [word for word in words(query) if word in index.vocab_dict]
        if index is None or not known:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(index.get_scores(known), dtype=np.float32)

    def save(self, directory: Path) -> None:
        """Writes the index: arrays and JSON."""
        (directory / "size").write_text(str(self._size), encoding="utf-8")
        if self._index is not None:
            self._index.save(str(directory), show_progress=False)

    @classmethod
    def load(cls, directory: Path) -> Bm25:
        """The index that `save` wrote."""
        from bm25s import BM25

        made = cls.__new__(cls)
        made._size = int((directory / "size").read_text(encoding="utf-8"))
        stored = any(directory.glob("*.npy"))
        made._index = BM25.load(str(directory), load_corpus=False) if stored else None
        return made
