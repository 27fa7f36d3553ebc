"""Turns of a conversation as chat templates know them, and the order in which they may stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tunesmith.base import nearest
from tunesmith.data.record import BadRow

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""OpenAI's, ShareGPT's and OpenAssistant's names of who speaks, and how chat templates call them."""

OPENING = ("system", "developer")
"""Roles that stand before the first question."""


def to_messages(turns: Any, *, column: str) -> list[dict[str, Any]]:
    """The turns of a column; tool calls, names and other keys are kept.

    Raises:
        BadRow: when they are no turns.
    """
    if not isinstance(turns, list) or not turns:
        found = "nothing" if turns is None else "an empty list" if turns == [] else type(turns).__name__
        raise BadRow(f"{column!r} must be a list of turns, found {found}")
    return [_message(turn, index) for index, turn in enumerate(turns, start=1)]


def _message(turn: Any, index: int) -> dict[str, Any]:
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
    weight = message.get("weight", 1)
    if not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise BadRow(f"the weight of turn {index} must be a number from 0 to 1, found {weight!r:.40}")
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


def check_order(messages: Sequence[dict[str, Any]]) -> None:
    """Raises BadRow when the roles are out of order or the conversation does not end with an answer."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow("there is no assistant turn to train on")
    if roles[-1] != "assistant":
        raise BadRow(f"the last turn is {roles[-1]!r}; a conversation must end with the assistant's answer")
    previous = ""
    for index, role in enumerate(roles, start=1):
        if role in OPENING and index > 1 and previous not in OPENING:
            raise BadRow(f"roles out of order: {role!r} at turn {index} comes after the conversation began")
        if role == "user" and previous == "user":
            raise BadRow(f"roles out of order: two user turns in a row (turns {index - 1} and {index})")
        if role == "assistant" and previous in ("assistant", "", *OPENING):
            before = f"after {previous!r}" if previous else "first"
            raise BadRow(f"roles out of order: the assistant speaks {before} (turn {index})")
        if role == "tool" and previous not in ("assistant", "tool"):
            raise BadRow(f"roles out of order: a tool answers at turn {index} without being called")
        previous = role


def with_system(messages: Sequence[dict[str, Any]], system: str | None) -> tuple[dict[str, Any], ...]:
    """The conversation with a system turn in front, unless it has one or there is nothing to say."""
    if not system or not messages or messages[0]["role"] in OPENING:
        return tuple(messages)
    return ({"role": "system", "content": system}, *messages)
