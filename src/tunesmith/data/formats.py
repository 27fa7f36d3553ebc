"""Which format rows have, and which columns of a file hold their parts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.data.record import BadRow, Record

LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected"), ("prompt", "instruction", "input", "system", "tools")),
    ("rated", ("prompt", "responses", "ratings"), ("system", "tools")),
    ("messages", ("messages",), ("system", "tools")),
    ("sharegpt", ("conversations",), ("system", "tools")),
    ("alpaca", ("instruction", "output"), ("input", "system")),
    ("task", ("task", "input", "output"), ("system",)),
    ("dolly", ("instruction", "context", "response"), ("system",)),
    ("instruction-response", ("instruction", "response"), ("context", "system")),
    ("unpaired", ("prompt", "completion", "label"), ("system", "tools")),
    ("prompt-completion", ("prompt", "completion"), ("system", "tools")),
    ("openassistant", ("message_id", "parent_id", "text", "role"), ("rank", "deleted")),
    ("token-labels", ("tokens", "labels"), ()),
    ("token-labels", ("tokens", "ner_tags"), ()),
    ("token-labels", ("tokens", "tags"), ()),
    ("token-labels", ("tokens", "pos_tags"), ()),
    ("labelled", ("text", "label"), ("system",)),
    ("labelled", ("text", "category"), ("system",)),
    ("labelled", ("text", "labels"), ("system",)),
    ("text", ("text",), ()),
)
"""Name, required and optional parts of each format, in the order in which they are tried."""

TREE = ("openassistant", ("prompt",), ())
"""A tree of messages in one row; told from a plain prompt by what stands in it."""

PROMPTS = ("prompts", ("prompt",), ("completion", "system", "tools"))
"""Prompts that a model answers by itself; nothing else that has a prompt is taken for this."""

ALIKE = {"instruction-response": "dolly", "unpaired": "prompt-completion"}
"""Formats whose rows may stand in one file: they are read in the same way, or told apart by the first row."""

PARTS = sorted({part for _, required, optional in LAYOUTS for part in required + optional})

QUESTIONS = "question query prompt instruction input problem document article dialogue source sentence text".split()
ANSWERS = (
    "answer answers output response reply completion solution target summary summaries highlights translation label "
    "labels category intent sql chosen"
).split()
"""Usual names of columns, from which a mapping is proposed; never from which one is made."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def choose_format(
    records: Sequence[Record], format_name: str, columns: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """The format of the rows, and for each part the column or template that holds it; empty for the part's own name.

    ``records`` are the first ones of a source; the format is that of the first row.

    When the parts in ``columns`` make up a format, nothing else of a file is read; otherwise what is missing is taken
    from the columns of the same name.

    Raises:
        InputError: for a part or column that does not exist, or when no format fits.
    """
    present = {name for record in records for name in record.fields}
    _check_columns(columns, present, records[0].source.file)
    where = str(records[0].source)
    if format_name == "auto":
        first = set(records[0].fields)
        tree = not columns and is_tree(records[0].fields.get("prompt"))
        name = TREE[0] if tree else detect_format(set(columns) or first, where, first if columns else ())
        if name == "unpaired" and not isinstance(records[0].fields.get(columns.get("label", "label")), bool):
            name = "prompt-completion"  # some label of the data's own, not whether the completion is good
    else:
        name = format_name
    available = present | set(columns)
    fitting = [layout for layout in (*LAYOUTS, TREE, PROMPTS) if layout[0] == name]
    layout = next((layout for layout in fitting if available.issuperset(layout[1])), None)
    if layout is None:
        missing = [part for part in fitting[0][1] if part not in available]
        raise InputError(
            f"rows of the format {name!r} have the columns {', '.join(fitting[0][1])}; there is no {missing[0]!r}"
            f"{nearest(missing[0], sorted(present))}",
            where=where,
            fix=f"declare another data.format, or {_mapping_advice(present)}",
        )
    if columns and not set(columns).issuperset(layout[1]):
        own = {part: part for part in layout[1] + layout[2] if part in present}
        return name, {**own, **columns}
    return name, dict(columns)


def detect_format(columns: Collection[str], where: str, beside: Collection[str] = ()) -> str:
    """The format that has these columns.

    Args:
        columns: of the first row, or the parts that a recipe maps.
        where: of the first row, for errors.
        beside: columns of the file that may complete mapped parts.

    Raises:
        InputError: listing the columns found, when no format fits or two readings do.
    """
    given, all_columns = set(columns), set(columns) | set(beside)
    completed = [
        name
        for name, required, optional in LAYOUTS
        if all_columns.issuperset(required) and given.issubset(required + optional)
    ]
    name = _exact(given) or next(iter(completed if beside else []), None)
    name = name or (PROMPTS[0] if given.issuperset(PROMPTS[1]) else None)
    if name is None:
        raise unknown_columns(given, where, all_columns)
    if name == "text" and (answer := _answer_beside_text(given)):
        raise InputError(
            f"beside the column 'text' there is {answer!r}: are these texts with answers, or raw text?",
            where=where,
            fix=f"say data.columns: {{prompt: text, completion: {answer}}}, or data.format: text",
        )
    return name


def unknown_columns(columns: Collection[str], where: str, all_columns: Collection[str]) -> InputError:
    """What is said of columns that are no format, or none that has answers.

    Args:
        columns: of the first row, or the parts that a recipe maps.
        all_columns: of the file.
    """
    unknown = sorted(set(columns).difference(PARTS))
    hints = [f"{column}{nearest(column, PARTS)}" for column in unknown if nearest(column, PARTS)]
    return InputError(
        f"no known format has the columns {', '.join(sorted(columns)) or '(none)'}"
        + (f" ({'; '.join(hints)})" if hints else ""),
        where=where,
        fix=_mapping_advice(all_columns),
    )


def _exact(columns: Collection[str]) -> str | None:
    return next((name for name, required, _ in LAYOUTS if set(columns).issuperset(required)), None)


def _answer_beside_text(columns: Collection[str]) -> str | None:
    return next((column for column in sorted(columns) if column.lower() in ANSWERS), None)


@lru_cache(maxsize=1024)
def other_format(columns: frozenset[str], chosen: str) -> str | None:
    """What a row with these columns is instead of ``chosen``, in words; None when it is that, or nothing known."""
    found = _exact(columns)
    if found == "text" and chosen == "text" and (answer := _answer_beside_text(columns)):
        return f"a text with {answer!r} beside it"
    if found is None or ALIKE.get(found, found) == ALIKE.get(chosen, chosen):
        return None
    if chosen == PROMPTS[0] and found == "prompt-completion":
        return None
    return f"in the format {found!r}"


def is_tree(prompt: Any) -> bool:
    """Whether this is the first message of a tree of OpenAssistant."""
    return isinstance(prompt, dict) and {"text", "role"} <= prompt.keys()


def mapped(record: Record, parts: Mapping[str, str]) -> Record:
    """The row by its parts; a part whose column this row does not have is absent.

    Raises:
        BadRow: when a template names a column that the row lacks or that is no text.
    """
    there = {part: value for part, value in parts.items() if value in record.fields or _PLACEHOLDER.search(value)}
    return Record({part: _filled(record.fields, value) for part, value in there.items()}, record.source)


def columns_of(value: str) -> set[str]:
    """The columns that the value of a mapping may name: itself, or those in its braces."""
    return {value, *(found[1] for found in _PLACEHOLDER.finditer(value) if found[1] is not None)}


def _filled(fields: Mapping[str, Any], value: str) -> Any:
    if value in fields:
        return fields[value]

    def part(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        if found[1] not in fields:
            raise BadRow(f"there is no column {found[1]!r}")
        return plain_text(fields[found[1]], found[1])

    return _PLACEHOLDER.sub(part, value)


def plain_text(value: Any, name: str) -> str:
    """A text or a number as text; nothing (JSON's null) is the empty text.

    Raises:
        BadRow: for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        raise BadRow(f"{name!r} must be text, found {value}: write what the model should say, such as yes or no")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{name!r} must be text, found {value}, which stands for a missing value")
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name!r} must be text, found {type(value).__name__}")
    return value


def _check_columns(columns: Mapping[str, str], present: set[str], file: str) -> None:
    for part, value in columns.items():
        if part not in PARTS:
            raise InputError(
                f"{part!r} is no part of a row{nearest(part, PARTS)}",
                where=f"data.columns.{part}",
                fix=f"parts: {', '.join(PARTS)}",
            )
        names = [found[1] for found in _PLACEHOLDER.finditer(value) if found[1] is not None]
        for name in [] if value in present else names or [value]:
            if name not in present:
                raise InputError(
                    f"there is no column {name!r}{nearest(name, sorted(present))}",
                    where=f"data.columns.{part}",
                    fix=f"columns of {file}: {', '.join(sorted(present))}; a value is the name of one, or a text with "
                    "names in braces ('Summarise: {document}'; write {{ and }} for braces themselves)",
                )


def _mapping_advice(columns: Collection[str]) -> str:
    lower = {name.lower(): name for name in sorted(columns, reverse=True)}
    answer = next((lower[name] for name in ANSWERS if name in lower), None)
    question = next((lower[name] for name in QUESTIONS if name in lower), None)
    prompt, completion = (question, answer) if question and answer and question != answer else ("question", "answer")
    return f"map your columns, for example data.columns: {{prompt: {prompt}, completion: {completion}}}"


def preference_advice(columns: Collection[str]) -> str:
    """How to train on the chosen answers of preference pairs alone."""
    if "instruction" in columns:
        mapping = "{output: chosen}"
    else:
        prompt = next((name for name in QUESTIONS if name in columns), "…")
        mapping = "{completion: chosen}" if prompt == "prompt" else f"{{prompt: {prompt}, completion: chosen}}"
    return (
        "use an objective over pairs, such as objective.kind: dpo; or name the answer to imitate: data.columns: "
        f"{mapping}, or {{messages: chosen}} where it is a whole conversation; or declare data.format to leave the "
        "pairs aside"
    )
