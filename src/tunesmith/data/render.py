"""The one renderer, for training and for inference: a row becomes token ids and the weights of its targets.

Two rules decide what becomes of control tokens (`<|im_end|>`, `</s>` …) that stand in the data as literal text:

- Under a chat template only the template writes them. In a user's question, in an answer, in a tool's result they are
  split into ordinary pieces of text, so that no row can end or open a turn.
- Without one (the layout `plain`, and raw text) they are what they say, because such data is often rendered
  beforehand. An answer that holds its own end is refused there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.batch import Example, Scope, Source
from tunesmith.data.formats import BadRow
from tunesmith.data.rows import Row
from tunesmith.models.templates import NAMED_TEMPLATES, Template, TemplateRefused, opening_text, special_tokens

TrainOn = Literal["answers", "last-answer", "everything"]
TOKEN_SCOPES: dict[str, Scope] = {"target_weights": "token"}

BREAK = "\ufdd0"
"""Parts literal control tokens in two; Unicode keeps this code point free for such internal use."""

ANCHORS = ("", "\n", ".")
"""What a continuation is tokenized behind, so that a tokenizer's own opening blank falls on something else."""

_WHERE = "data.template"
_CHOOSE = f"choose another data.template: {', '.join(NAMED_TEMPLATES)}, plain, or a Jinja file"


@dataclass(frozen=True)
class Rendered:
    """A row as the model sees it.

    Attributes:
        row: where it came from.
        example: what is trained on.
        prompt_ids: the tokens before the last answer, exactly as they are given to the model at inference.
        cut_ids: tokens that the length limit took away from the end.
        cut_targets: how many of those would have been targets.
    """

    row: Row
    example: Example
    prompt_ids: tuple[int, ...]
    cut_ids: tuple[int, ...] = ()
    cut_targets: int = 0


@dataclass(frozen=True)
class _Turn:
    """An assistant turn inside the whole text: where it starts, and how it is spelled up to the token that ends it."""

    start: int
    answer: str
    closing: str
    weight: float


class Renderer:
    """Turns rows into examples by one template and one tokenizer.

    Args:
        template: how conversations become text.
        tokenizer: the model's tokenizer.
        train_on: which tokens are targets.
        stop_ids: tokens that end the model's generation.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, stop_ids: set[int]
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.train_on: TrainOn = train_on
        self.stop_ids = set(stop_ids)
        self.notes: list[str] = []
        self._learned = False
        self._bos = opening_text(tokenizer)
        self._controls = special_tokens(tokenizer)
        self._controls |= {cast(str, tokenizer.convert_ids_to_tokens(token)): token for token in stop_ids}
        self._control = _any_of(self._controls)

    def learn_stop_ids(self) -> None:
        """Finds the token that closes an answer by rendering a short conversation; done once, before any row."""
        if self._learned:
            return
        self._learned = True
        messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
        with suppress(BadRow, InputError):
            self._render_conversation(Row(Source("template", 1), messages, references=("Hello",)))

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation up to where the model answers: a prefix of what is trained on."""
        self.learn_stop_ids()
        try:
            messages, tools = self._harmless(list(messages)), self._harmless(list(tools))
            text = self.template.text(messages, generation_prompt=True, tools=tools)
            return self._tokenized(text, list(self._starts(messages, tools, text).values()))[0]
        except (TemplateRefused, BadRow) as error:
            raise InputError(
                f"the chat template refuses this conversation: {error}", where=self.template.name, fix=_CHOOSE
            ) from error

    def render(self, row: Row) -> Rendered:
        """Raises BadRow when the template refuses the row, or its targets cannot be told apart for certain.

        Raises:
            InputError: when the template is unfit for every row.
        """
        if not row.messages:
            return self._render_text(row)
        self.learn_stop_ids()
        return self._render_conversation(row)

    def _render_conversation(self, row: Row) -> Rendered:
        try:
            text, starts, turns = self._spelled(row)
        except TemplateRefused as error:
            raise BadRow(f"the chat template refuses this conversation: {error}") from error
        ids, counts = self._tokenized(text, starts)
        self._refuse_doubled_opening(ids, by_template=self.template.jinja is not None)
        weights = torch.full((len(ids),), 1.0 if self.train_on == "everything" else 0.0)
        span = (0, 0)
        for turn in turns:
            start = counts[starts.index(turn.start)]
            span = (start, self._end_of_turn(ids, start, turn))
            weights[slice(*span)] = turn.weight
        weights[0] = 0.0
        if row.messages[-1].get("tool_calls") and not row.references[0].strip():
            row = replace(row, references=(self._decoded(ids[span[0] : span[1] - 1]).strip(),))
        self._remember_stop(ids[span[1] - 1])
        example = Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source)
        return Rendered(row, example, tuple(ids[: span[0]]))

    def _spelled(self, row: Row) -> tuple[str, list[int], list[_Turn]]:
        """The whole text; where each of its answers starts; and the turns that are trained on."""
        messages, tools = self._harmless(list(row.messages)), self._harmless(list(row.tools))
        text = self.template.text(messages, generation_prompt=False, tools=tools)
        self._refuse_omissions(text, messages, tools)
        starts = self._starts(messages, tools, text)
        last, turns = len(messages) - 1, []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or (self.train_on == "last-answer" and index != last):
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
            answer, closing = self._answer(alone[start:], message, index)
            if text[start : start + len(answer)] != answer:
                raise BadRow(_rewritten(index, last))
            lead = answer.partition(message["content"].strip())[0] if message["content"].strip() else ""
            if lead.strip() and self.template.jinja is not None:
                self._refuse_header(messages[:index], tools, text[:start], lead)
            turns.append(_Turn(start, answer, closing, float(message.get("weight", 1))))
        return text, list(starts.values()), turns

    def _starts(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], text: str) -> dict[int, int]:
        """For each assistant turn that the model would be asked for like this: where in the text its answer starts."""
        starts = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prefix = self.template.text(messages[:index], generation_prompt=True, tools=tools)
                if text.startswith(prefix):
                    starts[index] = len(prefix)
        return starts

    def _answer(self, tail: str, message: dict[str, Any], index: int) -> tuple[str, str]:
        """Of the text from an answer on, the part up to the control token that closes it; and that token."""
        if self.template.jinja is None:
            for token in self.stop_ids:
                spelled = cast(str, self.tokenizer.convert_ids_to_tokens(token))
                if spelled in message["content"]:
                    raise BadRow(f"the answer of turn {index + 1} holds the token {spelled}, which ends an answer")
            return tail, cast(str, self.tokenizer.eos_token)
        if not self._control.search(tail):
            self._learn_unmarked(tail)
        calls = message.get("tool_calls") or []
        said = calls[-1].get("function", calls[-1])["name"] if calls else message["content"]
        found, opened = None, 0
        for control in self._control.finditer(tail):
            if _folded(said) in _folded(tail[opened : control.start()]):
                found = control
                if not said.strip():
                    break
            opened = control.end()
        if found is None:
            raise BadRow(f"the template changes or leaves out what is said in turn {index + 1} (assistant)")
        if calls:  # a call may have closing tokens of its own before the one that ends the turn
            later = self._control.finditer(tail, found.start())
            found = next((control for control in later if self._controls[control[0]] in self.stop_ids), found)
        return tail[: found.end()], found[0]

    def _learn_unmarked(self, tail: str) -> None:
        """Some vocabularies hold the closing token without marking it as special; any added token will do then."""
        added = cast(dict[int, Any], getattr(self.tokenizer, "added_tokens_decoder", {}))
        closing = _any_of({str(token): token_id for token_id, token in added.items()}).search(tail)
        if closing is None:
            raise InputError(
                f"the template ({self.template.name}) never closes an answer with a control token of this tokenizer "
                f"(it writes {tail[-40:]!r}), so the model would not learn to stop",
                where=_WHERE,
                fix=_CHOOSE,
            )
        self._controls[closing[0]] = cast(int, self.tokenizer.convert_tokens_to_ids(closing[0]))
        self._control = _any_of(self._controls)

    def _refuse_header(
        self, asked: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], prefix: str, lead: str
    ) -> None:
        if self.template.text(asked, generation_prompt=False, tools=tools) == prefix:
            raise InputError(
                f"the template ({self.template.name}) writes no generation prompt, so the header of the answer "
                f"({lead!r}) would be trained on",
                where=_WHERE,
                fix="end the template with {% if add_generation_prompt %}…{% endif %}, or " + _CHOOSE,
            )

    def _refuse_omissions(self, text: str, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> None:
        """Templates drop what they do not know; what a row says and the model never reads is an error."""
        everything = _folded(text)
        for index, message in enumerate(messages, start=1):
            if message["role"] not in ("assistant", "tool") and _folded(message["content"]) not in everything:
                raise BadRow(f"the template changes or leaves out what is said in turn {index} ({message['role']})")
            for call in message.get("tool_calls") or []:
                if _folded(call.get("function", call)["name"]) not in everything:
                    raise BadRow(f"the template leaves out the tool calls of turn {index}")
        for tool in tools:
            name = tool.get("function", tool).get("name", "")
            if _folded(str(name)) not in everything:
                raise BadRow(f"the template leaves out the tools: {name!r} is not in the text")

    def _render_text(self, row: Row) -> Rendered:
        end = cast(int, self.tokenizer.eos_token_id)
        ids = self._encoded(self._bos + row.text)
        ids = ids if ids[-1:] == [end] else [*ids, end]
        self._refuse_doubled_opening(ids, by_template=False)
        weights = torch.ones(len(ids))
        weights[0] = 0.0
        return Rendered(row, Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source), ())

    def _harmless(self, value: Any) -> Any:
        """The same with every literal control token parted, so that it is tokenized as the text that it is."""
        if self.template.jinja is None:
            return value
        if isinstance(value, dict):
            return {key: inner if key == "role" else self._harmless(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._harmless(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if BREAK in value:
            raise BadRow("the text holds U+FDD0, which is no character")
        while self._control.search(value):
            value = self._control.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
        return value

    def _tokenized(self, text: str, starts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids of the whole, and how many stand before each of ``starts``.

        The ids before an answer must be those that the model is given at inference. Where a token of the whole text
        would straddle that boundary, what follows is tokenized by itself, and verified to spell the same text.
        """
        ids: list[int] = []
        counts: list[int] = []
        done = 0
        for end in [*starts, len(text)]:
            whole = self._extended([], "", text[:end])
            ids = whole if whole[: len(ids)] == ids else self._extended(ids, text[:done], text[done:end])
            counts.append(len(ids))
            done = end
        return ids, counts[:-1]

    def _extended(self, ids: list[int], done: str, piece: str) -> list[int]:
        """``ids``, which spell ``done``, and those of ``piece``, in which no token crosses a break."""
        done = done.replace(BREAK, "")
        for part in piece.split(BREAK):
            if part:
                ids = [*ids, *self._continuation(ids, done, part)] if ids else self._encoded(part)
            done += part
        return ids

    def _continuation(self, ids: list[int], done: str, piece: str) -> list[int]:
        """Token ids that spell ``piece`` after ``ids``."""
        before, whole = self._decoded(ids), self._decoded(self._encoded(done + piece))
        for anchor in ANCHORS:
            head = self._encoded(anchor) if anchor else []
            both = self._encoded(anchor + piece)
            found = both[len(head) :]
            spelled = self._decoded([*ids, *found])
            same = spelled == whole or (spelled.startswith(before) and _spells(spelled[len(before) :], piece))
            if both[: len(head)] == head and same:
                return found
        raise BadRow("the answer cannot be tokenized apart from its prompt")

    def _encoded(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _end_of_turn(self, ids: list[int], start: int, turn: _Turn) -> int:
        """Position after the token that closes the answer which starts at ``start``."""
        closing, left = self._controls[turn.closing], turn.answer.count(turn.closing)
        for position in range(start, len(ids)):
            left -= ids[position] == closing
            if left == 0:
                return position + 1
        raise BadRow(f"{turn.closing}, which closes an answer, is not tokenized as one token")

    def _remember_stop(self, token: int) -> None:
        if token in self.stop_ids:
            return
        self.stop_ids.add(token)
        self.notes.append(
            f"the template closes answers with {self.tokenizer.convert_ids_to_tokens(token)}, which the model's own "
            "settings do not list as a stop token; generation stops there too"
        )

    def _refuse_doubled_opening(self, ids: list[int], *, by_template: bool) -> None:
        opening = self.tokenizer.bos_token_id
        if opening is not None and len(ids) > 1 and ids[0] == ids[1] == opening:
            what = f"the begin-of-text token {self.tokenizer.bos_token} stands twice"
            if by_template:
                raise InputError(f"{what} in what the template writes", where=_WHERE, fix="remove one of them there")
            raise BadRow(f"{what}: it is put before every text, and this one brings its own")


def _any_of(tokens: dict[str, int]) -> re.Pattern[str]:
    """Matches any of these texts, the longest one where several begin; a single character is no control token."""
    spelled = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def _folded(text: str) -> str:
    return "".join(text.split())


def _spells(decoded: str, piece: str) -> bool:
    """Whether both are the same text; some tokenizers put a blank of their own behind every control token."""

    def lead(text: str) -> str:
        return text[: len(text) - len(text.lstrip())]

    return _folded(decoded) == _folded(piece) and lead(decoded) == lead(piece)


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
