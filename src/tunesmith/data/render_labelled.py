"""The renderer for models that judge: a text or a row of words becomes token ids, and places where outputs are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.batch import Example
from tunesmith.data.formats import LAYOUTS, PROMPTS
from tunesmith.data.record import BadRow
from tunesmith.data.render import PREFERENCES, TOKEN_SCOPES, Rendered, Renderer, tokenizer_sha256
from tunesmith.data.row import Row

CONVERSATIONS = tuple(
    dict.fromkeys(name for name, _, _ in LAYOUTS if name not in ("token-labels", "text", *PREFERENCES))
)
OWN = "the tokenizer's own opening and closing"


@dataclass
class LabelRenderer:
    """Turns rows into examples whose ``target_weights`` say where an output of the head is read.

    Attributes:
        reads: `row` for one output a row, which is noted at its last token; `first` or `last` for one output a word,
            at its first or last token (the last one has seen the whole word where a model looks back only).
        conversation: renders what was asked by a chat template; None gives the text as the tokenizer opens and closes
            it, which is what others give to such a model.
        answers_optional: whether a row may have no label at all.
    """

    tokenizer: PreTrainedTokenizerBase
    reads: Literal["row", "first", "last"]
    conversation: Renderer | None = None
    answers_optional: bool = False
    in_blocks: ClassVar[bool] = False
    notes: list[str] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)
    used_controls: set[int] = field(default_factory=set)

    @property
    def unused(self) -> tuple[str, ...]:
        others = (*PREFERENCES, "text", "openassistant", PROMPTS[0])
        if self.reads == "row":
            return (*others, "token-labels")
        return (*others, *CONVERSATIONS)

    @property
    def name(self) -> str:
        return OWN if self.conversation is None else self.conversation.name

    def identity(self) -> dict[str, Any]:
        """What decides how a row becomes tokens, as JSON values."""
        if self.conversation is not None:
            return {"reads": self.reads, "conversation": self.conversation.identity()}
        return {"reads": self.reads, "tokenizer": tokenizer_sha256(self.tokenizer)}

    def learn_stop_ids(self) -> None:
        """There are none to learn: nothing is written."""

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """Each row rendered, or what is wrong with it."""
        return (self._rows if self.reads == "row" else self._words)(rows)

    def _rows(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        found: list[Rendered | BadRow] = []
        texts = [self._asked(row) for row in rows]
        plain = [text for text in texts if isinstance(text, str)]
        encoded = iter(cast(Any, self.tokenizer(plain))["input_ids"] if plain else [])
        for row, text in zip(rows, texts, strict=True):
            ids = next(encoded) if isinstance(text, str) else text
            if isinstance(ids, BadRow):
                found.append(ids)
            elif not ids:
                found.append(BadRow("the text is empty"))
            else:
                found.append(self._rendered(row, ids, [len(ids) - 1]))
        return found

    def _asked(self, row: Row) -> str | list[int] | BadRow:
        """The text to judge, its token ids where a template writes them, or what is wrong."""
        if not row.messages:
            return BadRow("this row has no label: name its columns in data.columns, {text: …, label: …}")
        asked = row.messages[:-1]
        if self.conversation is not None:
            try:
                return self.conversation.prompt_ids(asked, row.tools)
            except InputError as error:
                return BadRow(error.what)
        if len(asked) != 1 or row.tools:
            return BadRow(
                "more than one turn stands before the label, and a bare text has no turns: name a data.template, for "
                "example chatml"
            )
        return str(asked[0]["content"])

    def _words(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                "labels of words need a tokenizer that says where its tokens stand",
                fix="use a model with tokenizer.json",
            )
        texts = [" ".join(row.words) for row in rows]
        encoded = cast(Any, self.tokenizer(texts, return_offsets_mapping=True)) if texts else {}
        found: list[Rendered | BadRow] = []
        for at, row in enumerate(rows):
            if not row.words:
                found.append(BadRow("this row has no labelled words: name its columns, {tokens: …, labels: …}"))
                continue
            places = self._places(row.words, encoded["offset_mapping"][at])
            missing = next((word for word, place in zip(row.words, places, strict=True) if place is None), None)
            if missing is not None:
                found.append(BadRow(f"the tokenizer makes nothing of the word {missing!r}, which has a label"))
                continue
            found.append(self._rendered(row, encoded["input_ids"][at], cast(list[int], places)))
        return found

    def _places(self, words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
        """For each word the token at which its output is read."""
        word_of: list[int] = []
        for number, word in enumerate(words):
            word_of += [number] * (len(word) + 1)  # and the blank behind it
        places: list[int | None] = [None] * len(words)
        for token, (start, end) in enumerate(offsets):
            if end <= start:
                continue
            word = word_of[end - 1]  # tokens may take the blank before a word along
            if places[word] is None or self.reads == "last":
                places[word] = token
        return places

    def _rendered(self, row: Row, ids: Sequence[int], places: Sequence[int]) -> Rendered:
        weights = torch.zeros(len(ids))
        weights[list(places)] = 1.0
        example = Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source)
        return Rendered(row, example, (), closing=self.closing)

    @cached_property
    def closing(self) -> int:
        """Tokens that the tokenizer, or the template, puts behind every text."""
        probe = "text"
        if self.conversation is not None:
            one, other = (self.conversation.prompt_ids([{"role": "user", "content": say}]) for say in (probe, "other"))
            shared = (at for at, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=False)) if a != b)
            return next(shared, 0)
        whole = cast(list[int], self.tokenizer(probe)["input_ids"])
        bare = cast(list[int], self.tokenizer(probe, add_special_tokens=False)["input_ids"])
        at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        return len(whole) - at - len(bare)
