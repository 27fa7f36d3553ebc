"""Records of any known format become rows: conversations with their reference answers, or raw text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.batch import Source
from tunesmith.data.formats import BadRow, choose_format, mapped, plain_text
from tunesmith.data.read import Record, RowErrors

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""OpenAI's and ShareGPT's names of who speaks, and how chat templates call them."""


@dataclass(frozen=True)
class Row:
    """One training or test row.

    Attributes:
        messages: the conversation as `{role, content, …}`, ending with an assistant turn; empty for raw text.
        text: raw text, when there is no conversation.
        references: every acceptable last answer; the first one is trained on.
        task: name of the task in a mixture.
        tools: definitions of the tools that the conversation may call.
    """

    source: Source
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    references: tuple[str, ...] = ()
    task: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    origin: int = field(default=0, compare=False)
    """Index of the training source that the row was read from."""

    @property
    def prompt_key(self) -> str:
        """Hash of everything before the last answer, with case and white space folded."""
        folded = [" ".join(part.casefold().split()) for part in self._said(self.messages[:-1])]
        return sha256("\x00".join(folded).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Hash of the whole row as it is, for exact duplicates."""
        return sha256("\x00".join(self._said(self.messages)).encode()).hexdigest()

    def _said(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        if not self.messages:
            return [self.text]
        tools = [json.dumps(tool, sort_keys=True, default=str) for tool in self.tools]
        return tools + [str(part) for m in messages for part in (m["role"], m["content"], m.get("tool_calls", ""))]


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
    chosen, parts = choose_format(records, format_name, columns)
    convert = CONVERTERS[chosen]
    if answer_after is not None:
        if chosen != "text":
            raise InputError(
                f"applies to raw text only, and these rows are {chosen}",
                where="data.answer_after",
                fix="remove it, or say data.format: text",
            )
        convert = _text_split_at(answer_after)
    errors, rows = RowErrors(), []
    for record in records:
        try:
            row = convert(mapped(record, parts) if parts else record)
            rows.append(_with_system(row, system) if system and row.messages else row)
        except BadRow as error:
            errors.add(record.source, str(error))
    errors.raise_any(
        f"every row must be in the format {chosen!r}"
        + ("" if format_name != "auto" else ", which the first row has; declare another with data.format")
    )
    return chosen, rows


def _text(record: Record, name: str, *, optional: bool = False) -> str:
    if name not in record.fields and not optional:
        raise BadRow(f"there is no {name!r}")
    return plain_text(record.fields.get(name), name)


def _answers(record: Record, name: str) -> tuple[str, ...]:
    """One answer, or a list of equally good ones."""
    value = record.fields.get(name)
    if not isinstance(value, list):
        return (_text(record, name),)
    try:
        texts = [plain_text(item, name) for item in value]
    except BadRow as error:
        raise BadRow(f"{name!r} must be text or a list of texts, found {value!r:.60}") from error
    return tuple(text for text in texts if text.strip()) or ("",)


def _exchange(record: Record, prompt: str, answers: tuple[str, ...], *, task: str | None = None) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers[0]}]
    if system := _text(record, "system", optional=True):
        messages.insert(0, {"role": "system", "content": system})
    return Row(record.source, tuple(messages), references=answers, task=task)


def _conversation(record: Record, turns: Any, *, column: str) -> Row:
    if not isinstance(turns, list) or not turns:
        found = "nothing" if turns is None else "an empty list" if turns == [] else type(turns).__name__
        raise BadRow(f"{column!r} must be a list of turns, found {found}")
    messages = [_message(turn, index) for index, turn in enumerate(turns, start=1)]
    system = _text(record, "system", optional=True)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    _check_order([message["role"] for message in messages])
    return Row(record.source, tuple(messages), references=(messages[-1]["content"],), tools=_tools(record))


def _message(turn: Any, index: int) -> dict[str, Any]:
    """A turn as chat templates know it; tool calls, names and other keys are kept."""
    if not isinstance(turn, dict) or not {"role", "from"} & turn.keys():
        raise BadRow(f"turn {index} is not an object with a role and a content")
    named = turn.get("role", turn.get("from"))
    if not isinstance(named, str) or named not in ROLES:
        raise BadRow(f"turn {index} has the unknown role {named!r}{nearest(str(named), list(ROLES))}")
    content = turn["content"] if "content" in turn else turn.get("value")
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = _joined_parts(content, index)
    if not isinstance(content, str):
        found = "nothing" if content is None else type(content).__name__
        raise BadRow(f"the content of turn {index} must be text, found {found}")
    message = {k: v for k, v in turn.items() if v is not None and k not in ("role", "from", "content", "value")}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call, index) for call in message["tool_calls"]]
    if message.get("weight", 1) not in (0, 1):
        raise BadRow(f"the weight of turn {index} must be 0 or 1, found {message['weight']!r:.40}")
    return {"role": ROLES[named], "content": content, **message}


def _joined_parts(parts: list[Any], index: int) -> str:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"turn {index} holds a part of the type {kind!r}; only text can be used")
    return "".join(part["text"] for part in parts)


def _call(call: Any, index: int) -> dict[str, Any]:
    """OpenAI writes the arguments of a call as JSON in a string; templates want the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"turn {index} holds a tool call without the name of a function")
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError as error:
            raise BadRow(f"the arguments of a tool call in turn {index} are not JSON") from error
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _tools(record: Record) -> tuple[dict[str, Any], ...]:
    value = record.fields.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("'tools' is text that is not JSON") from error
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("'tools' must be a list of definitions")
    return tuple(value)


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
    return _conversation(record, record.fields.get("conversations"), column="conversations")


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
    label = "category" if "category" in record.fields and "label" not in record.fields else "label"
    return _exchange(record, _text(record, "text"), _answers(record, label))


def _raw_text(record: Record) -> Row:
    return Row(record.source, text=_text(record, "text"))


def _text_split_at(marker: str) -> Callable[[Record], Row]:
    def convert(record: Record) -> Row:
        prompt, *answers = _text(record, "text").split(marker)
        if not answers:
            raise BadRow(f"the marker {marker!r} of data.answer_after does not occur")
        if len(answers) > 1:
            raise BadRow(
                f"the marker {marker!r} of data.answer_after occurs {len(answers)} times, so that the answer could "
                "begin at any of them"
            )
        return _exchange(record, prompt + marker, (answers[0],))

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
