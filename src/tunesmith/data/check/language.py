"""Scripts of all rows and languages of a sample: rows that differ from what most rows are written in."""

from __future__ import annotations

import unicodedata
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from tunesmith.data.check.finding import SHOWN, Finding, Instance, agreeing, counted, quoted, share
from tunesmith.data.check.said import Said, Store, evenly

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

SAMPLE = 2_000
LETTERS = 40
CONFIDENCE = 0.9
"""Texts with fewer letters, or of which the language is less certain, are not judged."""

MIXED_SHARE = 0.2
"""From this share on other scripts or languages are meant: translation, or data in several languages."""

ONE_WRITING = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "KATAKANA-HIRAGANA": "Japanese"}


@cache
def script_of_letter(letter: str) -> str:
    """``Latin``, ``Cyrillic`` …, by the first word of the character's name; empty for what is no letter."""
    if unicodedata.category(letter) not in ("Ll", "Lu", "Lt", "Lo"):
        return ""
    first = unicodedata.name(letter, "").split(" ")[0]
    if first in ("MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MICRO", "FEMININE", "MASCULINE", "OHM"):
        return ""
    return ONE_WRITING.get(first, first.capitalize())


def script_of(text: str) -> str:
    """The script of most letters; Japanese where kana stand among Han characters, empty without letters."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text[:200])) or any(map(str.isalpha, text)) else ""
    plain = text.encode("ascii", "ignore")
    # A few accents, quotation marks or emoji among plain letters: not worth counting, which takes long.
    if 20 * (len(text) - len(plain)) < len(text) and 8 * sum(map(plain[:200].count, b"aeiout")) > len(plain[:200]):
        return "Latin"
    counts = Counter[str]()
    for character, times in Counter(text).items():
        if script := script_of_letter(character):
            counts[script] += times
    if not counts:
        return ""
    if counts["Japanese"] and counts["Han"]:
        counts["Japanese"] += counts.pop("Han")
    return max(counts, key=lambda script: (counts[script], script))


class Languages:
    def __init__(self) -> None:
        self.names = [""]
        self.scripts = array("B")

    def add(self, said: Said) -> None:
        script = script_of(said.everything)
        if script not in self.names:
            self.names.append(script)
        self.scripts.append(min(self.names.index(script), 255))

    def findings(self, store: Store) -> list[Finding]:
        scripts = {i: self.names[code] for i, code in enumerate(self.scripts) if code and code < 255}
        found = _report("script", scripts, store, "")
        sampled = evenly(len(store), SAMPLE)
        languages = languages_of(store, sampled)
        note = f" in a sample of {len(sampled):,} rows" if len(sampled) < len(store) else ""
        return found + _report("language", languages, store, note)


def languages_of(store: Store, sampled: Sequence[int]) -> dict[int, str]:
    """Language (ISO 639) by row; only rows with enough letters and a sure answer."""
    texts: dict[int, str] = {}
    for index in sampled:
        prompt, answer = store.texts(index)
        text = answer if sum(map(str.isalpha, answer[:200])) >= LETTERS else f"{prompt}\n{answer}"
        if sum(map(str.isalpha, text[:1000])) >= LETTERS:
            texts[index] = text[:1000]
    if len(texts) < 2:
        return {}
    identifier = _identifier()
    judged = {index: identifier.classify(text) for index, text in texts.items()}
    return {index: name for index, (name, sure) in judged.items() if sure >= CONFIDENCE}


@cache
def _identifier() -> LanguageIdentifier:
    # Takes half a second to import and load.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _report(what: str, names: dict[int, str], store: Store, note: str) -> list[Finding]:
    counts = Counter(names.values())
    if len(counts) < 2:
        return []
    (main, most), *rest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others, of = sum(n for _, n in rest), len(names)
    shares = ", ".join(f"{name} {share(n, of)}" for name, n in [(main, most), *rest][:6])
    strange = (index for index, name in names.items() if name != main)
    instances = tuple(_instance(store, index, names[index]) for index, _ in zip(strange, range(SHOWN), strict=False))
    if others > MIXED_SHARE * of:
        title = f"the rows are written in several {what}s{note}: {shares}"
        fix = "nothing to do if that is meant (translation, several languages); then hold out rows of each"
        return [Finding("language", "note", title, others, of, instances, fix)]
    are = agreeing(others, "is", "are")
    title = f"{counted(others, 'row')} ({share(others, of)}){note} {are} not in the {what} of the others: {shares}"
    fix = "drop these rows unless they are meant; a few foreign rows teach the model to switch its language"
    return [Finding("language", "warning", title, others, of, instances, fix)]


def _instance(store: Store, index: int, name: str) -> Instance:
    prompt, answer = store.texts(index)
    shown = next((text for text in (prompt, answer) if script_of(text) == name), answer or prompt)
    return Instance(str(store.source(index)), f"{name}: {quoted(shown)}")
