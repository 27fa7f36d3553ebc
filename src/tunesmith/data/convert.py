"""A record of each format becomes a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunesmith.data.formats import plain_text
from tunesmith.data.record import BadRow, Record
from tunesmith.data.row import Row
from tunesmith.data.turns import OPENING, check_order, to_messages, with_system

LABELS = ("labels", "ner_tags", "tags", "pos_tags")
"""Columns of labels of words, in the order in which they are taken."""


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


def _system(record: Record) -> str:
    return _text(record, "system", optional=True)


def _exchange(record: Record, prompt: str, answers: tuple[str, ...], *, task: str | None = None) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answers[0]}]
    return Row(record.source, with_system(messages, _system(record)), references=answers, task=task)


def _conversation(record: Record, turns: Any, *, column: str) -> Row:
    messages = with_system(to_messages(turns, column=column), _system(record))
    check_order(messages)
    return Row(record.source, messages, references=(messages[-1]["content"],), tools=_tools(record))


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


def _messages(record: Record) -> Row:
    return _conversation(record, record.fields.get("messages"), column="messages")


def _sharegpt(record: Record) -> Row:
    return _conversation(record, record.fields.get("conversations"), column="conversations")


def _prompt_completion(record: Record) -> Row:
    prompt, completion = record.fields.get("prompt"), record.fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and isinstance(prompt[0], dict):
        return _conversation(record, [*prompt, *completion], column="prompt")
    return _exchange(record, _text(record, "prompt"), _answers(record, "completion"))


def _prompts(record: Record) -> Row:
    """A prompt as text or as turns, with a reference answer or without; the last turn is empty where there is none."""
    prompt = record.fields.get("prompt")
    answers = _answers(record, "completion") if "completion" in record.fields else ("",)
    if not isinstance(prompt, list):
        return _exchange(record, _text(record, "prompt"), answers)
    answer = {"role": "assistant", "content": answers[0]}
    messages = with_system([*to_messages(prompt, column="prompt"), answer], _system(record))
    check_order(messages)
    return Row(record.source, messages, references=answers, tools=_tools(record))


def _with_addition(record: Record, column: str) -> str:
    """An instruction with what it is about."""
    instruction, addition = _text(record, "instruction"), _text(record, column, optional=True)
    return f"{instruction}\n\n{addition}" if addition.strip() else instruction


def _alpaca(record: Record) -> Row:
    return _exchange(record, _with_addition(record, "input"), _answers(record, "output"))


def _dolly(record: Record) -> Row:
    return _exchange(record, _with_addition(record, "context"), _answers(record, "response"))


def _task(record: Record) -> Row:
    return _exchange(record, _text(record, "input"), _answers(record, "output"), task=_text(record, "task"))


def _labelled(record: Record) -> Row:
    label = next((name for name in ("label", "category", "labels") if name in record.fields), "label")
    return _exchange(record, _text(record, "text"), _answers(record, label))


def _raw_text(record: Record) -> Row:
    return Row(record.source, text=_text(record, "text"))


def text_split_at(marker: str) -> Callable[[Record], Row]:
    """A converter of raw text whose answers begin after a marker."""

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


def _preference(record: Record) -> Row:
    """Two conversations that differ in their last turn alone."""
    chosen, rejected = (_side(record, column) for column in ("chosen", "rejected"))
    for index, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), start=1):
        if one != other:
            raise BadRow(f"'chosen' and 'rejected' differ before the last turn (turn {index})")
    if len(chosen) != len(rejected):
        raise BadRow(f"'chosen' has {len(chosen)} turns and 'rejected' {len(rejected)}; only the last one may differ")
    return Row(record.source, chosen, references=(chosen[-1]["content"],), tools=_tools(record), rejected=rejected)


def _rated(record: Record) -> Row:
    """The best and the worst of several rated answers."""
    answers, ratings = (_list(record, name, "answer") for name in ("responses", "ratings"))
    if len(answers) != len(ratings) or len(answers) < 2:
        raise BadRow(f"there are {len(answers)} 'responses' and {len(ratings)} 'ratings'; two or more need one each")
    for rating in ratings:
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or rating != rating:
            raise BadRow(f"'ratings' must be numbers, found {rating!r:.40}")
    best, worst = (answers[ratings.index(bound)] for bound in (max(ratings), min(ratings)))
    fields = {**record.fields, "chosen": best, "rejected": worst}
    return _preference(Record(fields, record.source))


def _unpaired(record: Record) -> Row:
    """An answer of which it is known by itself whether it is good."""
    label = record.fields.get("label")
    if not isinstance(label, bool):
        raise BadRow(f"'label' must be true for a good completion or false for a bad one, found {label!r:.40}")
    return replace(_prompt_completion(record), desirable=label)


def _side(record: Record, column: str) -> tuple[dict[str, Any], ...]:
    """One side of a pair as a whole conversation; the prompt stands in it, or beside it as text or turns."""
    answer, prompt = record.fields.get(column), record.fields.get("prompt")
    if isinstance(answer, (list, dict)):
        turns = to_messages(answer if isinstance(answer, list) else [answer], column=column)
    else:
        turns = [{"role": "assistant", "content": _text(record, column)}]
    whole = any(turn["role"] == "user" for turn in turns)
    if isinstance(prompt, list) and prompt:
        before = to_messages(prompt, column="prompt")
        if whole and turns[: len(before)] != before:
            raise BadRow(f"{column!r} is a conversation that does not begin with the turns of 'prompt'")
        turns = turns if whole else before + turns
    elif not whole:
        asked = {"role": "user", "content": _question(record)}
        opening = [turn for turn in turns if turn["role"] in OPENING]
        turns = [*opening, asked, *turns[len(opening) :]]
    messages = with_system(turns, _system(record))
    check_order(messages)
    return messages


def _question(record: Record) -> str:
    if "prompt" not in record.fields and "instruction" in record.fields:
        return _with_addition(record, "input")
    return _text(record, "prompt")


def _token_labels(record: Record) -> Row:
    column = next((name for name in LABELS if name in record.fields), LABELS[0])
    words, labels = _list(record, "tokens"), _list(record, column)
    if len(words) != len(labels):
        raise BadRow(f"there are {len(words)} 'tokens' and {len(labels)} {column!r}; every word needs one label")
    for index, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise BadRow(f"word {index} of 'tokens' must be text, found {type(word).__name__}")
    if None in labels:
        raise BadRow(f"label {labels.index(None) + 1} of {column!r} is missing or a number without a name")
    return Row(record.source, words=tuple(words), labels=tuple(plain_text(label, column) for label in labels))


def _list(record: Record, name: str, of: str = "word") -> list[Any]:
    if name not in record.fields:
        raise BadRow(f"there is no {name!r}")
    if not isinstance(value := record.fields[name], list) or not value:
        found = "nothing" if value is None else "an empty list" if value == [] else type(value).__name__
        raise BadRow(f"{name!r} must be a list with an item for each {of}, found {found}")
    return value


CONVERTERS: dict[str, Callable[[Record], Row]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "instruction-response": _dolly,
    "prompt-completion": _prompt_completion,
    "prompts": _prompts,
    "task": _task,
    "labelled": _labelled,
    "preference": _preference,
    "rated": _rated,
    "unpaired": _unpaired,
    "token-labels": _token_labels,
    "text": _raw_text,
}
"""Of every format but OpenAssistant's, whose rows are not records."""
