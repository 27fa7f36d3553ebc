"""Verifiers: what an answer is worth by itself or beside a reference, from 0 to 1, without a model.

An answer is judged as a whole: white space at its ends does not count, anything else does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def is_exact(answer: str, references: Sequence[str]) -> float:
    """1 when the answer is one of the references, after white space at both ends is stripped."""
    return float(answer.strip() in {reference.strip() for reference in references})


def has_pattern(answer: str, pattern: re.Pattern[str]) -> float:
    """1 when the pattern is found somewhere in the answer."""
    return float(pattern.search(answer) is not None)


def has_number(answer: str, references: Sequence[str]) -> float:
    """1 when the last number of the answer equals the last number of a reference.

    `1,234`, `1234` and `1234.0` are the same number. Source of the convention: Cobbe et al. 2021 (GSM8K), whose
    answers end with the number that counts.
    """
    said = last_number(answer)
    return float(said is not None and said in {last_number(reference) for reference in references})


def last_number(text: str) -> Decimal | None:
    """The last number that stands in a text, exactly; None without any."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def json_value(answer: str) -> Any:
    """The value that the whole answer is as JSON.

    Raises:
        ValueError: when it is none; numbers that JSON does not have (NaN, Infinity) are none either.
    """
    try:
        return json.loads(answer, parse_constant=_refused)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def has_keys(answer: str, keys: Sequence[str]) -> float:
    """Of an answer that is JSON the share of these keys in it, 1 without any keys; 0 for one that is not JSON.

    With keys the answer must be an object.
    """
    try:
        value = json_value(answer)
    except ValueError:
        return 0.0
    if not keys:
        return 1.0
    return sum(key in value for key in keys) / len(keys) if isinstance(value, dict) else 0.0


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
