"""General English that every Python installation carries, for measuring what a model forgets by its perplexity."""

from __future__ import annotations

import ast
import importlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tunesmith.base import InputError

SHORTEST_PASSAGE, LONGEST_PASSAGE = 1000, 2000
FEWEST_PASSAGES = 5

MARKUP = (
    (re.compile(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\s*\[\d+\]_?"), ""),
    (re.compile(r"\s+"), " "),
    # A word that was broken over two lines at its hyphen.
    (re.compile(r"(?<=\w)- (?!and |or )(?=[a-z])"), "-"),
)
BULLET = re.compile(r"^\s*(?:[*-]|\d+\.|\(\w\))\s+")
ASIDES = ("Changed in version", "New in version", "Deprecated since", "Note:", "See also", "Added in version")


def general_text(characters: int = 60_000) -> tuple[str, list[str]]:
    """Returns the name of a source and passages of prose from it, each of 1,000 to 2,000 characters.

    The language reference that ``help()`` shows and Python's licence, or the modules' own descriptions where an
    installation has left those out. Passages are taken evenly from the whole, so that a smaller sample has the same
    mixture; the same Python gives the same passages.

    Args:
        characters: about how much text to return; less when the source has less.

    Raises:
        InputError: this Python carries no such text.
    """
    if characters < 1:
        raise InputError(f"characters must be positive, not {characters}", where="general_text")
    for name, documents in (("language reference", _topics()), ("module descriptions", _module_docstrings())):
        passages = list(_passages(documents))
        if len(passages) >= FEWEST_PASSAGES:
            licence = list(_passages(_licence()))
            name = f"Python {platform.python_version()}, {name}{' and licence' if licence else ''}"
            return name, _spread(passages + licence, characters)
    raise InputError(
        "this Python carries neither pydoc_data nor the source of its library, so there is no general text",
        where=sysconfig.get_path("stdlib"),
        fix="Pass a text file of your own for measuring what is forgotten.",
    )


def _topics() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return []
    return [topics[name] for name in sorted(topics)]


def _licence() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for directory in (library, library.parent, Path(os.__file__).parent):
        for name in ("LICENSE.txt", "LICENSE"):
            try:
                return [(directory / name).read_text(encoding="utf-8", errors="replace")]
            except OSError:
                continue
    return []


def _module_docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            docstring = ast.get_docstring(ast.parse(path.read_bytes()))
        except (OSError, SyntaxError, ValueError):
            continue
        if docstring:
            yield docstring


def _passages(documents: Iterable[str]) -> Iterator[str]:
    """Yields runs of paragraphs; none crosses from one document into the next, none is repeated."""
    seen: set[str] = set()
    for document in documents:
        passage: list[str] = []
        for paragraph in _paragraphs(document):
            folded = paragraph.casefold()
            if folded in seen:
                continue
            seen.add(folded)
            length = sum(map(len, passage)) + len(passage)
            if length + len(paragraph) > LONGEST_PASSAGE:
                passage = []
                length = 0
            passage.append(paragraph)
            if SHORTEST_PASSAGE <= length + len(paragraph) <= LONGEST_PASSAGE:
                yield "\n".join(passage)
                passage = []


def _paragraphs(document: str) -> Iterator[str]:
    """Yields what reads as prose: no headings, code, tables, grammar, or sentences that introduce those."""
    for block in re.split(r"\n\s*\n", document.expandtabs()):
        lines = block.strip("\n").splitlines()
        if not lines or re.match(r"\s{4}|\s*(>>>|\.\. |::)", lines[0]):
            continue
        bullets = sum(bool(BULLET.match(line)) for line in lines)
        entry = bullets == 0 and any(line.startswith("   ") for line in lines[1:])
        if entry or bullets > 1:
            continue
        text = " ".join(lines)
        if re.search(r"::=|::|>>>|[*=~_-]{4}|\.{4}|<-|->|https?:", text):
            continue
        text = BULLET.sub("", text)
        for pattern, replacement in MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        words = sum(character.isalpha() or character == " " for character in text)
        sentence = text[:1].isupper() and text.endswith((".", ".)", '."')) and not text.startswith(ASIDES)
        if sentence and len(text) >= 80 and words > 0.9 * len(text):
            yield text


def _spread(passages: list[str], characters: int) -> list[str]:
    average = sum(map(len, passages)) / len(passages)
    count = min(len(passages), max(1, round(characters / average)))
    return [passages[i * len(passages) // count] for i in range(count)]
