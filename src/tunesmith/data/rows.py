"""Records of any known format become rows: conversations with their reference answers, or raw text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.batch import Source
from tunesmith.data.read import Record, RowErrors

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "task": (("task", "input", "output"), ()),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "dolly": (("instruction", "context", "response"), ("category",)),
    "instruction-response": (("instruction", "response"), ("system",)),
    "prompt-completion": (("prompt", "completion"), ("system",)),
    "labelled": (("text", "label"), ()),
    "text": (("text",), ()),
}
"""Required and optional columns of each format, in the order in which they are tried."""


class BadRow(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Row:
    """One training or test row.

    Attributes:
        messages: the conversation as `{role, content, …}`, ending with an assistant turn; empty for raw text.
        text: raw text, when there is no conversation.
        references: every acceptable last answer; the first one is trained on.
        task: name of the task in a mixture.
    """

    source: Source
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    references: tuple[str, ...] = ()
    task: str | None = None
    origin: int = field(default=0, compare=False)
    """Index of the training source that the row was read from."""

    @property
    def prompt_key(self) -> str:
        """Hash of everything before the last answer, with case and white space folded."""
        said = [f"{m['role']}:{m.get('content')}" for m in self.messages[:-1]] or [self.text]
        return _folded_hash(said)

    @property
    def key(self) -> str:
        """Hash of the whole row as it is, for exact duplicates."""
        said = [f"{m['role']}:{m.get('content')}:{m.get('tool_calls')}" for m in self.messages] or [self.text]
        return sha256("\x00".join(said).encode()).hexdigest()


def detect_format(record: Record) -> str:
    """Raises InputError, listing the columns found, when no format fits."""
    columns = set(record.fields)
    for name, (required, _) in PARTS.items():
        if columns.issuperset(required):
            return name
    if {"text", "category"} <= columns:
        return "labelled"
    if {"chosen", "rejected"} <= columns:
        raise InputError(
            "these are preference pairs (chosen, rejected), which objective.kind: sft does not use",
            where=str(record.source),
            fix="name the answer to imitate: data.columns: {completion: chosen}",
        )
    known = [column for required, optional in PARTS.values() for column in required + optional]
    hints = [f"{column}{nearest(column, known)}" for column in sorted(columns) if nearest(column, known)]
    raise InputError(
        f"no known format has the columns {', '.join(sorted(columns)) or '(none)'}"
        + (f" ({'; '.join(hints)})" if hints else ""),
        where=str(record.source),
        fix="map your columns, for example data.columns: {prompt: question, completion: answer}",
    )


def to_rows(
    records: Sequence[Record],
    *,
    format_name: str,
    columns: dict[str, str],
    answer_after: str | None,
    system: str | None,
) -> tuple[str, list[Row]]:
    """Converts records, and returns the format's name with the rows.

    Raises:
        InputError: for unknown columns, rows of another format, wrong types, roles out of order; all are counted.
    """
    mapped = _map_columns(records, columns) if columns else list(records)
    chosen = detect_format(mapped[0]) if format_name == "auto" else format_name
    convert = CONVERTERS.get(chosen)
    if convert is None:
        raise InputError(f"{chosen!r} rows cannot be used for objective.kind: sft", where="data.format")
    if answer_after is not None:
        if chosen != "text":
            raise InputError(f"applies to raw text only, and these rows are {chosen}", where="data.answer_after")
        chosen, convert = "text", _text_split_at(answer_after)
    errors, rows = RowErrors(), []
    for record in mapped:
        try:
            row = convert(record)
            rows.append(_with_system(row, system) if system and row.messages else row)
        except BadRow as error:
            errors.add(record.source, str(error))
    errors.raise_any(
        f"every row must be in the format {chosen!r}"
        + ("" if format_name != "auto" else ", which the first row has; declare another with data.format")
    )
    return chosen, rows


def _map_columns(records: Sequence[Record], columns: dict[str, str]) -> list[Record]:
    known = sorted({part for required, optional in PARTS.values() for part in required + optional})
    for part in columns:
        if part not in known:
            raise InputError(
                f"{part!r} is no part of a row{nearest(part, known)}",
                where=f"data.columns.{part}",
                fix=f"parts: {', '.join(known)}",
            )
    present = set(records[0].fields)
    for part, value in columns.items():
        for name in re.findall(r"\{(\w[\w .-]*)\}", value) or [value]:
            if name not in present:
                raise InputError(
                    f"there is no column {name!r}{nearest(name, sorted(present))}",
                    where=f"data.columns.{part}",
                    fix=f"columns of {records[0].source.file}: {', '.join(sorted(present))}",
                )
    return [
        Record({part: _filled(record.fields, value) for part, value in columns.items()}, record.source)
        for record in records
    ]


def _filled(fields: dict[str, Any], value: str) -> Any:
    if "{" not in value or value in fields:
        return fields.get(value)
    return re.sub(r"\{(\w[\w .-]*)\}", lambda found: str(fields.get(found[1], "")), value)


def _text(record: Record, name: str, *, optional: bool = False) -> str:
    value = record.fields.get(name)
    if value is None and optional:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise BadRow(f"{name!r} must be text, found {found}")
    return value


def _answers(record: Record, name: str) -> tuple[str, ...]:
    """One answer, or a list of equally good ones."""
    value = record.fields.get(name)
    if isinstance(value, list):
        if not value or not all(isinstance(item, str) for item in value):
            raise BadRow(f"{name!r} must be text or a list of texts, found {value!r:.60}")
        return tuple(value)
    return (_text(record, name),)


def _exchange(record: Record, prompt: str, answers: tuple[str, ...], *, task: str | None = None) -> Row:
    messages: list[dict[str, Any]] = []
    if system := _text(record, "system", optional=True):
        messages.append({"role": "system", "content": system})
    if not prompt.strip():
        raise BadRow("the prompt is empty")
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers[0]}]
    return Row(record.source, tuple(messages), references=answers, task=task)


def _conversation(record: Record, messages: Any, *, column: str) -> Row:
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{column!r} must be a list of turns, found {type(messages).__name__}")
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise BadRow(f"turn {index} is not an object with a role and a content")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise BadRow(f"turn {index} has the unknown role {role!r}{nearest(str(role), ROLES)}")
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise BadRow(f"the content of turn {index} must be text, found {type(content).__name__}")
        turns.append({**{k: v for k, v in message.items() if v is not None}, "content": content})
    _check_order([turn["role"] for turn in turns])
    return Row(record.source, tuple(turns), references=(turns[-1]["content"],))


def _check_order(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise BadRow("there is no assistant turn to train on")
    if roles[-1] != "assistant":
        raise BadRow(f"the last turn is {roles[-1]!r}; a conversation must end with the assistant's answer")
    previous = ""
    for index, role in enumerate(roles, start=1):
        if role in ("system", "developer") and index > 1 and previous not in ("system", "developer"):
            raise BadRow(f"roles out of order: {role!r} at turn {index} comes after the conversation began")
        if role == "user" and previous == "user":
            raise BadRow(f"roles out of order: two user turns in a row (turns {index - 1} and {index})")
        if role == "assistant" and previous in ("assistant", "", "system", "developer"):
            before = f"after {previous!r}" if previous else "first"
            raise BadRow(f"roles out of order: the assistant speaks {before} (turn {index})")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise BadRow(f"roles out of order: a tool answers at turn {index} without being called")
        previous = role


def _messages(record: Record) -> Row:
    return _conversation(record, record.fields.get("messages"), column="messages")


def _sharegpt(record: Record) -> Row:
    turns = record.fields.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("'conversations' must be a list of turns")
    messages = []
    for index, turn in enumerate(turns, start=1):
        role = turn.get("from", turn.get("role"))
        if role not in SHAREGPT_ROLES:
            raise BadRow(f"turn {index} has the unknown role {role!r}{nearest(str(role), list(SHAREGPT_ROLES))}")
        messages.append({"role": SHAREGPT_ROLES[role], "content": turn.get("value", turn.get("content"))})
    if system := _text(record, "system", optional=True):
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(record, messages, column="conversations")


def _prompt_completion(record: Record) -> Row:
    prompt, completion = record.fields.get("prompt"), record.fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and isinstance(prompt[0], dict):
        return _conversation(record, [*prompt, *completion], column="prompt")
    return _exchange(record, _text(record, "prompt"), _answers(record, "completion"))


def _with_input(instruction: str, addition: str) -> str:
    return f"{instruction}\n\n{addition}" if addition.strip() else instruction


def _alpaca(record: Record) -> Row:
    prompt = _with_input(_text(record, "instruction"), _text(record, "input", optional=True))
    return _exchange(record, prompt, _answers(record, "output"))


def _dolly(record: Record) -> Row:
    prompt = _with_input(_text(record, "instruction"), _text(record, "context", optional=True))
    return _exchange(record, prompt, _answers(record, "response"))


def _task(record: Record) -> Row:
    return _exchange(record, _text(record, "input"), _answers(record, "output"), task=_text(record, "task"))


def _labelled(record: Record) -> Row:
    return _exchange(
        record, _text(record, "text"), _answers(record, "label" if "label" in record.fields else "category")
    )


def _raw_text(record: Record) -> Row:
    return Row(record.source, text=_text(record, "text"))


def _text_split_at(marker: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        prompt, found, answer = _text(record, "text").partition(marker)
        if not found:
            raise BadRow(f"the marker {marker!r} of data.answer_after does not occur")
        return _exchange(record, prompt + found, (answer,))

    return convert


CONVERTERS: dict[str, Callable[[Record], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "instruction-response": _dolly,
    "prompt-completion": _prompt_completion,
    "task": _task,
    "labelled": _labelled,
    "text": _raw_text,
}


def _with_system(row: Row, system: str) -> Row:
    if row.messages[0]["role"] in ("system", "developer"):
        return row
    return replace(row, messages=({"role": "system", "content": system}, *row.messages))


def _folded_hash(parts: Sequence[str]) -> str:
    folded = "\x00".join(" ".join(part.casefold().split()) for part in parts)
    return sha256(folded.encode()).hexdigest()
