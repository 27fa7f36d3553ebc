"""What a file of examples says by itself: how much there is, how much is new, and whether it teaches facts or form."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.ingest import ingest
from tunesmith.data.inspection import inspect
from tunesmith.data.row import Row
from tunesmith.data.row_file import RowFile
from tunesmith.data.sources import readings
from tunesmith.data.spec import DataSpec

LOOKED_AT = 2_000
"""Rows whose answers are taken apart, evenly spread over the file."""
TOKENS_A_WORD = 1.33
"""Tokens of English text a word (OpenAI's rule of thumb: 100 tokens are 75 words); no figure here needs to be exact."""
FEW_LABELS = 100
STALE = re.compile(
    r"\b(?:19|20)\d\d\b|\bv?\d+\.\d+(?:\.\d+)+\b|[$€£]\s?\d|\b\d+(?:\.\d+)?\s?(?:USD|EUR|%)|"
    r"\b(?:current(?:ly)?|latest|as of|today|this year|CEO|president|price[sd]?|version)\b",
    re.IGNORECASE,
)
"""What in an answer is likely to be wrong one day: years, versions, prices, shares, and words for the present."""
NAME = re.compile(r"(?<![.!?:\n])\s([A-Z][a-z]+(?:\s[A-Z][a-z]+)*)")
NUMBER = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class DataLook:
    """What was found.

    Attributes:
        format: how the rows are written.
        rows: those that can be used, wrong ones left out.
        tokens: estimated from words.
        duplicates: rows that stand there once more, word for word.
        near_duplicates: rows that repeat another one almost.
        median_prompt, median_answer: in words.
        labels: distinct answers, when they are few enough to be labels; else 0.
        new_facts: share of answers with a name or number that does not stand in their prompt.
        stale: share of answers with what is likely to change, such as years, prices and versions.
        same_form: share of answers of the commonest shape.
        form: that shape in words.
        personal: rows with what looks like personal data.
        notes: of the reader.
    """

    path: str
    format: str
    rows: int
    tokens: int
    duplicates: int
    near_duplicates: int
    median_prompt: int
    median_answer: int
    labels: int
    new_facts: float
    stale: float
    same_form: float
    form: str
    personal: int
    notes: list[str] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        return self.format == "text"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def look_at(path: str, progress: Progress = silent) -> DataLook:
    """Reads a file as training would.

    Raises:
        InputError: when it cannot be read, has no rows, or has wrong ones.
    """
    ingested = ingest(readings(DataSpec(train=path)), progress)
    ingested.refuse_wrong_rows()
    rows, [source] = ingested.rows, ingested.sources
    if not len(rows):
        raise InputError("the file holds no rows", where=path, fix="name a file with at least one row")
    found = inspect(rows, {"train": np.arange(len(rows))}, [], progress)
    concerned = {finding.kind: finding.rows for finding in found.findings}
    answers = [_said(rows[int(at)]) for at in np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int)]
    prompt_words = [len(prompt.split()) for prompt, _ in answers]
    answer_words = [len(answer.split()) for _, answer in answers]
    form, same = _commonest_form([answer for _, answer in answers])
    words = (sum(prompt_words) + sum(answer_words)) * len(rows) / len(answers)
    return DataLook(
        path=path,
        format=source.format,
        rows=len(rows),
        tokens=round(TOKENS_A_WORD * words),
        duplicates=_repeated(rows),
        near_duplicates=concerned.get("near-duplicates", 0),
        median_prompt=round(float(np.median(prompt_words))),
        median_answer=round(float(np.median(answer_words))),
        labels=_labels([answer for _, answer in answers]),
        new_facts=_share(_says_something_new(prompt, answer) for prompt, answer in answers),
        stale=_share(STALE.search(answer) is not None for _, answer in answers),
        same_form=same,
        form=form,
        personal=concerned.get("personal-data", 0),
        notes=list(source.notes),
    )


def _said(row: Row) -> tuple[str, str]:
    """Prompt and answer; raw text is all answer."""
    if row.words:
        return " ".join(row.words), " ".join(row.labels)
    if not row.messages:
        return "", row.text
    turns = [message["content"] for message in row.messages if isinstance(message.get("content"), str)]
    return "\n".join(turns[:-1]), turns[-1] if turns else ""


def _repeated(rows: RowFile) -> int:
    return len(rows) - len(np.unique(rows.index["key"]))


def _share(values: Any) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def _labels(answers: list[str]) -> int:
    distinct = Counter(answer.strip() for answer in answers)
    few = len(distinct) <= FEW_LABELS and len(answers) >= 5 * len(distinct)
    return len(distinct) if few and max(len(label.split()) for label in distinct) <= 5 else 0


def _says_something_new(prompt: str, answer: str) -> bool:
    """Whether an answer holds a name or a number that its question does not: what a model would have to know."""
    if not prompt:
        return False
    known = prompt.casefold()
    specifics = [*NAME.findall(answer), *NUMBER.findall(answer)]
    return any(part.strip(".,").casefold() not in known for part in specifics)


def _commonest_form(answers: list[str]) -> tuple[str, float]:
    """The shape that most answers share, in words, and their share."""
    shapes = Counter(_form(answer) for answer in answers)
    [(form, count)] = shapes.most_common(1)
    return form, count / len(answers)


def _form(answer: str) -> str:
    text = answer.strip()
    if text[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except ValueError:
            return "almost JSON"
        return f"JSON with the keys {', '.join(sorted(value))}" if isinstance(value, dict) else "a JSON list"
    if re.match(r"(?:SELECT|WITH|INSERT|UPDATE|DELETE)\b", text):
        return "SQL"
    if text.startswith("```") or re.match(r"(?:def|class|import|from) ", text):
        return "code"
    if text.count("|") >= 2 and "\n" not in text:
        return "fields between bars"
    if re.match(r"(?:[-*•]|\d+[.)])\s", text):
        return "a list"
    sentences = len(re.findall(r"[.!?](?:\s|$)", text))
    return "a few words" if sentences == 0 and len(text.split()) <= 8 else "one sentence" if sentences <= 1 else "prose"
