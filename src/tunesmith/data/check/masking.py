"""Patterns of personal data and of access keys, and the masked form in which they may be shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

EMAIL = re.compile(r"[A-Za-z0-9_.+%-]{1,64}@((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})(?![\w@])")
RESERVED_DOMAIN = re.compile(
    r"(?:.*\.)?(?:example\.(?:com|org|net)|example|test|invalid|localhost|localdomain)", re.IGNORECASE
)
"""RFC 2606 and RFC 6761: names that belong to nobody."""

SERVICE_ACCOUNTS = ("git", "hg", "svn", "noreply", "no-reply", "donotreply")

DIGIT_RUN = re.compile(r"\d(?:[ ()./-]{0,3}\d){6,}")
"""At least seven digits with separators; a text without such a run holds neither a phone nor a card number."""

INTERNATIONAL = re.compile(
    r"(?<!\d[ -])(?<![\w.+=*/^-])\+[1-9]\d{0,3}(?:[ ./-]?(?:\(\d{1,4}\)|\d{1,12})){1,6}(?![\w%]|[.,]\d)"
)
NORTH_AMERICAN = re.compile(
    r"(?<!\d[ -])(?<![\w.,/:#=+-])(?:1[ .-])?(?:\(([2-9]\d\d)\) ?|([2-9]\d\d)([ .-]))([2-9]\d\d)[ .-](\d{4})"
    r"(?![\w%]|[-.,/]\d)"
)
NATIONAL = re.compile(r"(?<!\d[ -])(?<![\w.,:#=+-])\(?0[1-9]\d{0,4}\)?(?:[ /-]{1,3}\d{2,8}){1,5}(?![\w%]|[-.,/:]\d)")
CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w%]|[-.,]\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
DATE = re.compile(r"0\d[ /-]\d{1,2}[ /-](?:19|20)\d\d")

ACCESS_KEY = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}|\bsk-(?:[a-z]+-)*[A-Za-z0-9_]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
)
KEY_MARKS = ("AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "sk-", "xox", "PRIVATE KEY")

IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15),
    **dict.fromkeys(("BE",), 16),
    **dict.fromkeys(("DK", "FI", "NL"), 18),
    **dict.fromkeys(("SI",), 19),
    **dict.fromkeys(("AT", "EE", "LT", "LU"), 20),
    **dict.fromkeys(("CH", "HR", "LV", "LI"), 21),
    **dict.fromkeys(("BG", "DE", "GB", "IE"), 22),
    **dict.fromkeys(("AE", "IL"), 23),
    **dict.fromkeys(("CZ", "ES", "RO", "SA", "SE", "SK"), 24),
    **dict.fromkeys(("PT",), 25),
    **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("FR", "GR", "IT", "MC", "SM"), 27),
    **dict.fromkeys(("CY", "HU", "PL"), 28),
    **dict.fromkeys(("BR", "UA"), 29),
    **dict.fromkeys(("MT",), 31),
}
"""Length by country, from the IBAN registry of ISO 13616; other countries need only the check digits."""


@dataclass(frozen=True)
class Private:
    """A stretch of text that should not be shown.

    Attributes:
        sort: ``e-mail address``, ``phone number``, ``card number``, ``IBAN`` or ``access key``.
        shown: its masked form.
    """

    sort: str
    start: int
    end: int
    shown: str


def private_parts(text: str) -> list[Private]:
    """Every e-mail address, phone, card and account number and access key, in order, none inside another."""
    found: list[Private] = []
    for part in _candidates(text):
        if not any(part.start < other.end and other.start < part.end for other in found):
            found.append(part)
    return sorted(found, key=lambda part: part.start)


def masked(text: str) -> str:
    """The text with private parts in their masked form."""
    pieces, position = [], 0
    for part in private_parts(text):
        pieces += [text[position : part.start], part.shown]
        position = part.end
    return "".join([*pieces, text[position:]])


def _candidates(text: str) -> Iterator[Private]:
    """The surest first, because what overlaps an earlier one is left out."""
    if any(map(text.__contains__, KEY_MARKS)):
        for m in ACCESS_KEY.finditer(text):
            yield Private("access key", *m.span(), f"{m.group()[:4]}…")
    if "@" in text:
        yield from _emails(text)
    if not DIGIT_RUN.search(text):
        return
    for m in IBAN.finditer(text):
        if is_iban(m.group()):
            yield Private("IBAN", *m.span(), f"{m.group()[:2]}…{m.group()[-2:]}")
    for m in CARD.finditer(text):
        if is_card(m.group()):
            yield Private("card number", *m.span(), f"…{m.group()[-4:]}")
    yield from _phones(text)


def _emails(text: str) -> Iterator[Private]:
    for m in EMAIL.finditer(text):
        name, domain = m.group().rsplit("@", 1)
        if RESERVED_DOMAIN.fullmatch(domain) or name.lower() in SERVICE_ACCOUNTS or domain.startswith("self."):
            continue
        yield Private("e-mail address", *m.span(), f"{name[0]}…@{domain[0]}….{domain.rsplit('.', 1)[1]}")


def _phones(text: str) -> Iterator[Private]:
    for m in INTERNATIONAL.finditer(text):
        if is_international_phone(m.group()):
            yield _phone(m)
    for m in NORTH_AMERICAN.finditer(text):
        # 555-0100 to 555-0199 are kept for fiction (North American Numbering Plan).
        if not (m.group(4) == "555" and m.group(5).startswith("01")):
            yield _phone(m)
    for m in NATIONAL.finditer(text):
        if is_national_phone(m.group()):
            yield _phone(m)


def _phone(match: re.Match[str]) -> Private:
    return Private("phone number", *match.span(), f"{match.group()[:3]}…{match.group()[-2:]}")


def digits_of(text: str) -> str:
    return "".join(c for c in text if c.isdigit())


def is_international_phone(text: str) -> bool:
    """A plus and 9 to 15 digits (E.164), not a signed decimal, not the numbers kept for fiction."""
    digits = digits_of(text)
    if re.fullmatch(r"\+\d+\.\d+", text) or not 9 <= len(digits) <= 15:
        return False
    return not (digits.startswith("1") and len(digits) == 11 and digits[4:9] == "55501")


def is_national_phone(text: str) -> bool:
    """A number with a trunk prefix 0, as in Europe: 9 to 12 digits in groups.

    Dates, ISBNs and enumerations (01 02 03 04 05) have the same look and are left out.
    """
    digits, groups = digits_of(text), [int(part) for part in re.findall(r"\d+", text)]
    if not 9 <= len(digits) <= 12 or DATE.match(text):
        return False
    if len(digits) == 10 and text.count("-") == 3 and sum((10 - i) * int(d) for i, d in enumerate(digits)) % 11 == 0:
        return False
    steps = {b - a for a, b in pairwise(groups)}
    return not (len(groups) >= 4 and len(steps) == 1)


def is_card(text: str) -> bool:
    """A card number of a known issuer (prefix and length of ISO/IEC 7812) with a right Luhn digit."""
    digits = digits_of(text)
    if len({*text} - {*digits}) > 1 or not _issued(digits, len(digits)):
        return False
    doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def _issued(digits: str, length: int) -> bool:
    two, three, four = int(digits[:2]), int(digits[:3]), int(digits[:4])
    return (
        (digits[0] == "4" and length in (13, 16, 19))  # Visa
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and length == 16)  # Mastercard
        or (two in (34, 37) and length == 15)  # American Express
        or ((four == 6011 or 644 <= three <= 649 or two == 65) and 16 <= length <= 19)  # Discover
        or ((two in (36, 38, 39) or 300 <= three <= 305) and length == 14)  # Diners Club
        or (3528 <= four <= 3589 and 16 <= length <= 19)  # JCB
        or (two == 62 and 16 <= length <= 19)  # UnionPay
    )


def is_iban(text: str) -> bool:
    """An IBAN of its country's length whose remainder modulo 97 is 1 (ISO 13616)."""
    compact = text.replace(" ", "")
    if IBAN_LENGTHS.get(compact[:2], len(compact)) != len(compact) or not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1
