"""A conversation as text: where each of its answers starts, and which token ends it.

Two rules decide what becomes of control tokens (`<|im_end|>`, `</s>` …) that stand in the data as literal text:

- Under a chat template only the template writes them. In a user's question, in an answer, in a tool's result they are
  split into ordinary pieces of text, so that no row can end or open a turn.
- Without one (the layout `plain`, and raw text) they are what they say, because such data is often rendered
  beforehand. An answer that holds its own end is refused there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.data.formats import BadRow
from tunesmith.data.rows import Row
from tunesmith.data.tokenize import BREAK, holds
from tunesmith.models.templates import Template, TemplateRefused, choose_template, special_tokens

TrainOn = Literal["answers", "last-answer", "everything"]

WHERE = "data.template"
THINKING, THOUGHT = "<think>", "</think>"
_PLAIN_ROLES = ["user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """An assistant turn inside the whole text: where it starts, and how it is spelled up to the token that ends it."""

    start: int
    answer: str
    closing: str
    weight: float


@dataclass(frozen=True)
class Spelled:
    """A row as text.

    Attributes:
        text: the whole, in which literal control tokens are parted by ``BREAK``.
        starts: where the answers start that the model would be asked for like this, in characters, ascending.
        turns: those that are trained on, each of which starts at one of ``starts``.
    """

    text: str
    starts: list[int]
    turns: list[Turn]


class Speller:
    """Writes conversations by one template.

    Args:
        stop_ids: tokens that end the model's generation; the caller may add to the set.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, stop_ids: set[int]
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.train_on: TrainOn = train_on
        self.stop_ids = stop_ids
        self.controls = special_tokens(tokenizer)
        self.controls |= {cast(str, tokenizer.convert_ids_to_tokens(token)): token for token in stop_ids}
        self._know(self.controls)

    def _know(self, controls: dict[str, int]) -> None:
        self.control_ids = frozenset(controls.values())
        self._control = _any_of(controls)
        self._openings = tuple({token[:2] for token in controls if len(token) > 1})  # quicker to look for

    def spelled(self, row: Row) -> Spelled:
        """Raises BadRow or TemplateRefused for a row that cannot be written, InputError for an unfit template."""
        self._refuse_fallback(row)
        messages, tools = self.harmless(list(row.messages)), self.harmless(list(row.tools))
        text = self.template.text(messages, generation_prompt=False, tools=tools)
        self._refuse_omissions(text, messages, tools)
        prefixes = self._prefixes(messages, tools)
        starts = {index: len(prefix) for index, prefix in prefixes.items() if text.startswith(prefix)}
        last, turns = len(messages) - 1, []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or (self.train_on == "last-answer" and index != last):
                continue
            if index == last and index not in starts and prefixes[index].rstrip().endswith(THINKING):
                text, turn = self._behind_thinking(messages, tools, prefixes[index])
                starts = {at: start for at, start in starts.items() if text.startswith(prefixes[at])}
                starts[index] = turn.start
                turns.append(turn)
                continue
            # An earlier answer must be trained on as the model gives it: when it was the last one.
            alone = (
                text
                if index == last
                else self.template.text(messages[: index + 1], generation_prompt=False, tools=tools)
            )
            start = starts.get(index)
            if start is None or alone[:start] != text[:start]:
                raise BadRow(_rewritten(index, last))
            turn = self._turn(messages[: index + 1], tools, alone, start)
            if index == last:  # with the closing token that only a next turn would have brought
                text = text if text.startswith(turn.answer, start) else text[:start] + turn.answer
            if not text.startswith(turn.answer, start):
                raise BadRow(_rewritten(index, last))
            turns.append(turn)
        return Spelled(text, list(starts.values()), turns)

    def asked(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> tuple[str, list[int]]:
        """A conversation up to where the model answers, and where its earlier answers start."""
        harmless, described = self.harmless(list(messages)), self.harmless(list(tools))
        text = self.template.text(harmless, generation_prompt=True, tools=described)
        prefixes = self._prefixes(harmless, described).values()
        return text, [len(prefix) for prefix in prefixes if text.startswith(prefix)]

    def _prefixes(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> dict[int, str]:
        """For each assistant turn the text with which the model would be asked for it."""
        return {
            index: self.template.text(messages[:index], generation_prompt=True, tools=tools)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        }

    def _turn(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], alone: str, start: int
    ) -> Turn:
        """The last of ``messages``, which are spelled ``alone``."""
        message, index = messages[-1], len(messages) - 1
        answer, closing = self._answer(alone[start:], messages, tools, alone)
        lead = answer.partition(message["content"].strip())[0] if message["content"].strip() else ""
        if lead.strip() and self.template.jinja is not None:
            self._refuse_header(messages[:index], tools, alone[:start], lead)
        return Turn(start, answer, closing, float(message.get("weight", 1)))

    def _answer(
        self, tail: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], alone: str
    ) -> tuple[str, str]:
        """Of the text from an answer on, the part up to the control token that closes it; and that token."""
        message, index = messages[-1], len(messages) - 1
        if self.template.jinja is None:
            for token in self.stop_ids:
                spelled = cast(str, self.tokenizer.convert_ids_to_tokens(token))
                if spelled in message["content"]:
                    raise BadRow(f"the answer of turn {index + 1} holds the token {spelled}, which ends an answer")
            return tail, cast(str, self.tokenizer.eos_token)
        calls = message.get("tool_calls") or []
        said = calls[-1].get("function", calls[-1])["name"] if calls else message["content"]
        if alone.removesuffix(tail).rstrip().endswith(THINKING):  # the prompt opened what the row opens once more
            said = said.lstrip().removeprefix(THINKING)
        found = self._closing(tail, said)
        if found is None and (closing := self._next_turn(messages, tools)):
            if holds(tail, said):
                return tail + closing, closing
        elif found is None and not self._control.search(tail):
            self._learn_unmarked(tail)
            found = self._closing(tail, said)
        if found is None:
            raise BadRow(f"the template changes or leaves out what is said in turn {index + 1} (assistant)")
        if calls:  # a call may have closing tokens of its own before the one that ends the turn
            later = self._control.finditer(tail, found.start())
            found = next((control for control in later if self.controls[control[0]] in self.stop_ids), found)
        return tail[: found.end()], found[0]

    def _closing(self, tail: str, said: str) -> re.Match[str] | None:
        """The control token behind what is said."""
        found, opened = None, 0
        for control in self._control.finditer(tail):
            if holds(tail[opened : control.start()], said):
                found = control
                if not said.strip():
                    break
            opened = control.end()
        return found

    def _next_turn(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str | None:
        """GLM-4 closes an answer by opening the next turn: the stop token with which that turn opens, if it is one."""
        called = bool(messages[-1].get("tool_calls"))
        # Something short in place of the answer: a next turn may take its thinking out, and leaves the rest as it is.
        shown = [*messages[:-1], messages[-1] if called else {"role": "assistant", "content": "Hello"}]
        following = {"role": "tool" if called else "user", "content": "Hello"}
        try:
            alone = self.template.text(shown, generation_prompt=False, tools=tools)
            longer = self.template.text([*shown, following], generation_prompt=False, tools=tools)
        except TemplateRefused:
            return None
        opening = self._control.match(longer, len(alone)) if longer.startswith(alone) else None
        return opening[0] if opening and self.controls[opening[0]] in self.stop_ids else None

    def _behind_thinking(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], prefix: str
    ) -> tuple[str, Turn]:
        """The last answer behind a generation prompt that opens its thinking, which the template would take out.

        The prompt is what the model is given, and the row says what it should go on with; only the token that closes
        the answer is taken from what the template makes of it.
        """
        message, last = messages[-1], len(messages) - 1
        thought, ends, said = message["content"].partition(THOUGHT)
        if not said.strip() or message.get("tool_calls"):
            raise BadRow(
                f"the template asks the model with a text that ends in {prefix[-20:]!r}, and this answer holds no "
                f"thinking: write {THINKING}…{THOUGHT} before what it says, or name in data.template a copy of the "
                "template whose generation prompt does not open the thinking"
            )
        shown = self.template.text(messages, generation_prompt=False, tools=tools)
        before = self.template.text(messages[:last], generation_prompt=False, tools=tools)
        if not shown.startswith(before):
            raise BadRow(_rewritten(last, last))
        spoken = [*messages[:last], {**message, "content": said.strip()}]
        closing = self._answer(shown[len(before) :], spoken, tools, shown)[1]
        opened = prefix[len(prefix.rstrip()) :]
        thought = thought.lstrip().removeprefix(THINKING).removeprefix(opened)
        answer = thought + ends + said + closing
        return prefix + answer, Turn(len(prefix), answer, closing, float(message.get("weight", 1)))

    def _learn_unmarked(self, tail: str) -> None:
        """Some vocabularies hold the closing token without marking it as special; any added token will do then."""
        added = cast(dict[int, Any], getattr(self.tokenizer, "added_tokens_decoder", {}))
        closing = _any_of({str(token): token_id for token_id, token in added.items()}).search(tail)
        if closing is None:
            raise InputError(
                f"the template ({self.template.name}) never closes an answer with a control token of this tokenizer "
                f"(it writes {tail[-40:]!r}), so the model would not learn to stop",
                where=WHERE,
                fix=choose_template(),
            )
        self.controls[closing[0]] = cast(int, self.tokenizer.convert_tokens_to_ids(closing[0]))
        self._know(self.controls)

    def _refuse_fallback(self, row: Row) -> None:
        if not self.template.fallback:
            return
        called = row.tools or any(message.get("tool_calls") for message in row.messages)
        if called or [message["role"] for message in row.messages] != _PLAIN_ROLES:
            raise InputError(
                "the model has no chat template, and these rows are conversations, with several turns, a system text "
                "or tools",
                where=WHERE,
                fix=choose_template(),
            )

    def _refuse_header(
        self, asked: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], prefix: str, lead: str
    ) -> None:
        if self.template.text(asked, generation_prompt=False, tools=tools) == prefix:
            raise InputError(
                f"the template ({self.template.name}) writes no generation prompt, so the header of the answer "
                f"({lead!r}) would be trained on",
                where=WHERE,
                fix="end the template with {% if add_generation_prompt %}…{% endif %}, or " + choose_template(),
            )

    def _refuse_omissions(self, text: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
        """Templates drop what they do not know; what a row says and the model never reads is an error."""
        for index, message in enumerate(messages, start=1):
            if message["role"] not in ("assistant", "tool") and not holds(text, message["content"]):
                raise BadRow(f"the template changes or leaves out what is said in turn {index} ({message['role']})")
            for call in message.get("tool_calls") or []:
                if not holds(text, call.get("function", call)["name"]):
                    raise BadRow(f"the template leaves out the tool calls of turn {index}")
        for tool in tools:
            name = tool.get("function", tool).get("name", "")
            if not holds(text, str(name)):
                raise BadRow(f"the template leaves out the tools: {name!r} is not in the text")

    def harmless(self, value: Any) -> Any:
        """The same with every literal control token parted, so that it is tokenized as the text that it is."""
        if self.template.jinja is None:
            return value
        if isinstance(value, dict):
            return {key: inner if key == "role" else self.harmless(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.harmless(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if BREAK in value:
            raise BadRow("the text holds U+FDD0, which is no character")
        while any(opening in value for opening in self._openings) and self._control.search(value):
            value = self._control.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
        return value


def _any_of(tokens: dict[str, int]) -> re.Pattern[str]:
    """Matches any of these texts, the longest one where several begin; a single character is no control token."""
    spelled = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def _rewritten(index: int, last: int) -> str:
    if index == last:
        return (
            "the template renders this conversation for training and for generation in two ways: what the model "
            "would be given is no prefix of what it would be trained on"
        )
    return (
        f"the template rewrites earlier turns (turn {index + 1}), so they cannot be trained on as the model "
        "will see them; set data.train_on: last-answer"
    )
