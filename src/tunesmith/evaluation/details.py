"""Names, numbers, addresses and access keys in texts: what should not come back from training rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tunesmith.data.check.masking import digits_of, private_parts

Kind = Literal["names", "numbers", "addresses", "access keys"]
KINDS: tuple[Kind, ...] = ("names", "numbers", "addresses", "access keys")
SURE: tuple[Kind, ...] = ("numbers", "addresses", "access keys")
"""Kinds that are told by their form; names are only runs of capitalised words, among which there are other things."""

_SORTS: dict[str, Kind] = {"e-mail address": "addresses", "access key": "access keys"}
_RUN = re.compile(r"\d(?:[ ()./-]{0,3}\d)*")
_LONG_NUMBER = re.compile(r"(?<![\w.,])\d(?:[ ,./-]?\d){4,}(?!\w)")
"""Five digits or more: a year or a small count is easily guessed."""
_WORD = r"[^\W\d_a-z][\w'’-]+"
_STREET = re.compile(
    rf"\b\d{{1,5}}[a-z]? (?:{_WORD} ){{1,3}}(?i:street|st|road|rd|avenue|ave|lane|ln|drive|boulevard|blvd|square)\b"
    rf"|\b{_WORD}(?:straße|strasse|str\.|weg|gasse|allee|platz) \d{{1,4}}[a-z]?\b"
    r"|\b\d{1,4},? (?i:rue|avenue|boulevard|place) (?:d[eu]s? |de la |d')?[^\W\d_a-z][\w'’ -]{2,40}"
)
_CAPITALS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*(?: [^\W\d_]+(?:['’-][^\W\d_]+)*)+")
_OPENERS = frozenset(
    "a an the this that these those in on at by for from to with of and or but if when while as is are was were it its "
    "he she they we you i my your his her their our dear hello hi thanks thank please yes no not".split()
)


@dataclass(frozen=True)
class Detail:
    """A piece of a text that is about somebody.

    Attributes:
        folded: what is compared: digits alone, or the text in lower case.
        shown: masked, fit for a report.
    """

    kind: Kind
    folded: str
    shown: str


def details_of(text: str) -> list[Detail]:
    """Every detail of a text once, in the order of `KINDS`."""
    return sorted(dict.fromkeys(_found(text)), key=lambda detail: KINDS.index(detail.kind))


def says(text: str, detail: Detail) -> bool:
    """Whether a text holds a detail, however it is spaced or written in capitals."""
    if detail.kind == "numbers":
        return any(detail.folded in digits_of(run) for run in _RUN.findall(text)) or detail.folded in _folded(text)
    return detail.folded in _folded(text)


def _found(text: str) -> Iterator[Detail]:
    taken: list[tuple[int, int]] = []
    for part in private_parts(text):
        taken.append((part.start, part.end))
        kind, said = _SORTS.get(part.sort, "numbers"), text[part.start : part.end]
        folded = digits_of(said) if kind == "numbers" and part.sort != "IBAN" else _folded(said)
        yield Detail(kind, folded, part.shown)
    for match in _STREET.finditer(text):
        taken.append(match.span())
        yield Detail("addresses", _folded(match.group()), f"{match.group()[:3]}…")
    for match in _LONG_NUMBER.finditer(text):
        if not any(match.start() < end and start < match.end() for start, end in taken):
            digits = digits_of(match.group())
            yield Detail("numbers", digits, f"{digits[:2]}…{digits[-1:]}")
    # What is an address is no name besides.
    for start, end in taken:
        text = f"{text[:start]}{'.' * (end - start)}{text[end:]}"
    for name in _names(text):
        yield Detail("names", _folded(name), " ".join(f"{word[0]}…" for word in name.split()))


def _names(text: str) -> Iterator[str]:
    """Two to four capitalised words beside each other, without one that opens a sentence and is no name."""
    for match in _CAPITALS.finditer(text):
        run: list[str] = []
        for word in [*match.group().split(" "), ""]:
            parts = re.split("['’-]", word)
            is_name = all(part[:1].isupper() and not part[1:].isupper() for part in parts)
            if is_name and not (not run and word.lower() in _OPENERS):
                run.append(word)
                continue
            if 2 <= len(run) <= 4:
                yield " ".join(run)
            run = []


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
