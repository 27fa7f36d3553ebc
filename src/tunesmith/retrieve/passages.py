"""Texts cut into passages at paragraphs, then at lines, sentences and words, until each keeps to a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Counting = Callable[[str], int]
"""Tokens of a text."""

_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?…。！？])\s+"), re.compile(r"\s+"))
_JOINS = ("\n\n", "\n", " ", " ")


@dataclass(frozen=True)
class Passage:
    """A text that can be found.

    Attributes:
        source: file and line, or file and number of the passage.
    """

    source: str
    text: str


def parted(text: str, source: str, most: int, count: Counting) -> list[Passage]:
    """The passages of a text: as many whole paragraphs each as fit into ``most`` tokens.

    A paragraph that does not fit is cut at its lines, then at sentences, then between words; a word that does not
    fit stands by itself.
    """
    pieces = [piece for piece in _pieces(text.strip(), most, count, 0) if piece.strip()]
    if len(pieces) == 1:
        return [Passage(source, pieces[0])]
    return [Passage(f"{source}#{number}", piece) for number, piece in enumerate(pieces, 1)]


def _pieces(text: str, most: int, count: Counting, level: int) -> Iterator[str]:
    if level == len(_ENDS) or count(text) <= most:
        yield text
        return
    gathered, size = list[str](), 0
    for part in filter(None, _ENDS[level].split(text)):
        own = count(part)
        joint = 1 if gathered and level < 2 else 0  # what joins them is a token of its own at most
        if gathered and size + joint + own > most:
            yield _JOINS[level].join(gathered)
            gathered, size, joint = [], 0, 0
        if own > most:
            yield from _pieces(part, most, count, level + 1)
        else:
            gathered.append(part)
            size += joint + own
    if gathered:
        yield _JOINS[level].join(gathered)
