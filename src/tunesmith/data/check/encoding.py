"""Signs that a text was damaged on its way, or holds what a reader does not see."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from tunesmith.data.check.finding import Finding, Level, Tally, counted, quoted, share
from tunesmith.data.check.said import Said

# The characters that bytes 0x80 to 0xBF become when they are read as Windows-1252, or as Latin-1.
_CONTINUATION = "".join(
    sorted({bytes([b]).decode("cp1252", "ignore") for b in range(0x80, 0xC0)} | {chr(b) for b in range(0x80, 0xC0)})
)
_TAIL = f"[{re.escape(_CONTINUATION)}]"
_PAIR = re.compile(f"[\u00c2\u00c3\u00d0\u00d1\u00e2-\u00f0]{_TAIL}")
MOJIBAKE = re.compile(
    f"[\u00c2\u00c3]{_TAIL}|[\u00e2-\u00ef]{_TAIL}{{2}}|\u00f0{_TAIL}{{3}}|(?:[\u00d0\u00d1]{_TAIL}){{2,}}"
)
"""UTF-8 read one byte a character: Western accents, punctuation and most scripts, emoji, Cyrillic.

Two-character forms of other scripts are left out: É before a closing quotation mark is one, and right.
"""

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]")
CONTROL_1 = re.compile("[\x80-\x84\x86-\x9f]")
HIDDEN = re.compile(
    "[\u200b\u2060\ufeff\u180e\u202a-\u202e\u2066-\u2069]|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]"
)
"""Zero-width characters, direction overrides ("Trojan Source", Boucher and Anderson 2021) and tag characters; joiners
and direction marks, which Persian, Indic scripts, Hebrew and emoji need, and the tags of flags are left out."""

PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")
MARKUP = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|[a-z]{2,8}(?=;)|#\d{2,6}|#x[0-9a-fA-F]{2,5});"
    r"|</?(?:p|br|div|span|a|b|i|u|em|strong|ul|ol|li|h[1-6]|table|tr|td|th|img|font|script|style)(?:\s[^<>]{0,300})?/?>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sign:
    """One thing to look for: ``rows`` completes "12 rows …"; ``fix`` says what to do."""

    level: Level
    rows: str
    fix: str
    tally: Tally = field(default_factory=Tally)


class Encoding:
    def __init__(self) -> None:
        self.seen = 0
        self.signs = {
            "mojibake": Sign(
                "problem",
                "hold UTF-8 that was read as Latin-1 or Windows-1252 (mojibake)",
                "write the file again from its origin as UTF-8; the model would learn to write these letters",
            ),
            "replacement": Sign(
                "problem",
                "hold U+FFFD, which stands where a character was lost",
                "write the file again from its origin with the right encoding; the lost letters cannot be restored",
            ),
            "hidden": Sign(
                "problem",
                "hold characters that cannot be seen (zero-width, direction overrides, tags)",
                "remove them unless they are meant: text that a reader does not see can carry instructions",
            ),
            "control": Sign("warning", "hold control characters", "remove them; a tokenizer spends odd tokens on them"),
            "private use": Sign(
                "warning",
                "hold characters of the private use area, which mean something in one font only",
                "replace them with the characters that the font showed",
            ),
            "markup": Sign(
                "note", "hold HTML tags or entities", "strip them, unless the model is to read or write HTML"
            ),
            "not composed": Sign(
                "note",
                "hold accents apart from their letters (not in the Unicode form NFC)",
                "normalise the file to NFC, so that the same word has the same tokens everywhere",
            ),
        }

    def add(self, said: Said) -> None:
        self.seen += 1
        text = said.everything
        # `isprintable` is many times faster than the patterns, and false for all that they look for.
        printable = text.replace("\n", "").replace("\t", "").isprintable()
        if not printable:
            self._search(said, "control", CONTROL)
        if "&" in text or "<" in text:
            self._search(said, "markup", MARKUP)
        if text.isascii():
            return
        if m := mojibake(text):
            self._note(said, "mojibake", m.start(), f" where {_repaired(m.group())!r} was meant")
        if not printable:
            self._search(said, "hidden", HIDDEN)
            self._search(said, "control", CONTROL_1)
            self._search(said, "private use", PRIVATE_USE)
        if (at := text.find("\ufffd")) >= 0:
            self._note(said, "replacement", at)
        if not unicodedata.is_normalized("NFC", text):
            self._note(said, "not composed", 0)

    def _search(self, said: Said, sign: str, pattern: re.Pattern[str]) -> None:
        if m := pattern.search(said.everything):
            self._note(said, sign, m.start())

    def _note(self, said: Said, sign: str, at: int, more: str = "") -> None:
        tally = self.signs[sign].tally
        text = "" if tally.full else quoted(said.everything[max(at - 20, 0) : at + 40]) + more
        tally.add(said.source, text)

    def findings(self) -> list[Finding]:
        found = []
        for sign in self.signs.values():
            rows = sign.tally.rows
            if rows:
                holds = sign.rows.replace("hold ", "holds ", 1) if rows == 1 else sign.rows
                title = f"{counted(rows, 'row')} ({share(rows, self.seen)}) {holds}"
                instances = tuple(sign.tally.instances)
                found.append(Finding("encoding", sign.level, title, rows, self.seen, instances, sign.fix))
        return found


def mojibake(text: str) -> re.Match[str] | None:
    """The first stretch that becomes shorter, valid text when it is encoded back and read as UTF-8."""
    if not _PAIR.search(text):
        return None
    return next((m for m in MOJIBAKE.finditer(text) if _repaired(m.group())), None)


def _repaired(stretch: str) -> str:
    """What was meant, or an empty string when the bytes are not UTF-8 or give nothing printable."""
    raw = b"".join(_byte(c) for c in stretch)
    try:
        meant = raw.decode()
    except UnicodeDecodeError:
        return ""
    return meant if all(c.isprintable() or c == "\xa0" for c in meant) else ""


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")
