"""The one renderer, for training and for inference: a row becomes token ids and the weights of its targets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, ClassVar, Protocol, cast

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Source
from tunesmith.batch import Example, Scope
from tunesmith.data.formats import PROMPTS, BadRow
from tunesmith.data.rows import Row
from tunesmith.data.spec import DataSpec
from tunesmith.data.spelling import WHERE, Spelled, Speller, TrainOn, Turn
from tunesmith.data.tokenize import BREAK, Pieces, Tokenized
from tunesmith.models.templates import (
    SPELLED_OUT,
    Template,
    TemplateRefused,
    choose_template,
    opening_text,
    resolve_template,
)

__all__ = ["TOKEN_SCOPES", "Rendered", "Renderer", "RowRenderer", "TrainOn", "tokenizer_sha256"]

TOKEN_SCOPES: dict[str, Scope] = {"target_weights": "token"}

PREFERENCES = ("preference", "rated", "unpaired")
"""Formats of rows with answers that are not to be imitated."""

ROWS_AT_ONCE = 1024
"""Rows whose texts are given to the tokenizer in one call: enough for its threads, little enough for memory."""

_PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
_LIKE_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>")


@dataclass(frozen=True)
class Rendered:
    """A row as the model sees it.

    Attributes:
        row: where it came from.
        example: what is trained on.
        prompt_ids: the tokens before the last answer, exactly as they are given to the model at inference.
        cut_ids: tokens that the length limit took away from the end.
        cut_targets: how many of those would have been targets.
        closing: of a row that is judged, how many tokens at its end no limit may take away; None in rows to write.
    """

    row: Row
    example: Example
    prompt_ids: tuple[int, ...]
    cut_ids: tuple[int, ...] = ()
    cut_targets: int = 0
    closing: int | None = None

    @property
    def is_pair(self) -> bool:
        """Whether a second, worse answer to the same prompt stands behind the first."""
        return self.example.segments is not None


_Written = tuple[Spelled, int] | BadRow | InputError
"""A row as text, and how many stop tokens were known as it was written; or why it cannot be."""


class RowRenderer(Protocol):
    """Whatever turns rows into examples.

    Attributes:
        notes: what a user should know.
        stop_ids: tokens that end what the model writes.
        used_controls: ids of the control tokens that were written so far.
    """

    notes: list[str]
    stop_ids: set[int]
    used_controls: set[int]
    answers_optional: bool
    """Whether a row may leave its answer empty."""
    in_blocks: ClassVar[bool]
    """Whether rows are documents, which are cut and laid together into blocks of equal length."""

    @property
    def name(self) -> str:
        """How rows become text, in words."""
        ...

    @property
    def unused(self) -> tuple[str, ...]:
        """Formats of rows that hold nothing to render."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides how a row becomes tokens, as JSON values."""
        ...

    def learn_stop_ids(self) -> None: ...

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]: ...


class Renderer:
    """Turns rows into examples by one template and one tokenizer.

    Args:
        template: how conversations become text.
        tokenizer: the model's tokenizer.
        train_on: which tokens are targets.
        stop_ids: tokens that end the model's generation.

    Attributes:
        notes: what a user should know about the template.
        used_controls: ids of the control tokens that were written so far, around what the data say.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, stop_ids: set[int]
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.train_on: TrainOn = train_on
        self.stop_ids = set(stop_ids)
        self.notes: list[str] = []
        self.used_controls: set[int] = set()
        self._learned = False
        self._opening = tokenizer.bos_token_id
        self._bos = opening_text(tokenizer)
        self._speller = Speller(template, tokenizer, train_on, self.stop_ids)
        self._pieces = Pieces(tokenizer)

    answers_optional = False
    in_blocks: ClassVar[bool] = False
    unused: tuple[str, ...] = (*PREFERENCES, "token-labels", PROMPTS[0])

    @property
    def name(self) -> str:
        return self.template.name

    def identity(self) -> dict[str, Any]:
        """What decides how a row becomes tokens, as JSON values."""
        return {
            "template": [self.template.name, self.template.jinja, self.template.bos],
            "train_on": self.train_on,
            "stop_ids": sorted(self.stop_ids),
            "tokenizer": tokenizer_sha256(self.tokenizer),
        }

    @classmethod
    def of(cls, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> Renderer:
        """The renderer of a recipe's `data` section."""
        return cls(resolve_template(spec.template, tokenizer), tokenizer, spec.train_on, stop_ids)

    def learn_stop_ids(self) -> None:
        """Finds the token that closes an answer by rendering a short conversation; done once, before any row."""
        if self._learned:
            return
        self._learned = True
        with suppress(BadRow, InputError):
            self._one(Row(Source("template", 1), _PROBE, references=("Hello",)))
            self._look_at_controls()

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation up to where the model answers: a prefix of what is trained on."""
        self.learn_stop_ids()
        try:
            return self._pieces.tokenized(*self._speller.asked(messages, tools))[0]
        except (TemplateRefused, BadRow) as error:
            raise InputError(
                f"the chat template refuses this conversation: {error}",
                where=self.template.name,
                fix=choose_template(),
            ) from error

    def render(self, row: Row) -> Rendered:
        """Raises BadRow when the template refuses the row, or its targets cannot be told apart for certain.

        Raises:
            InputError: when the template is unfit for every row.
        """
        if row.messages:
            self.learn_stop_ids()
        return self._one(row)

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """What ``render`` gives for every row, or the BadRow that it raises; many times faster than one by one.

        Raises:
            InputError: when the template is unfit for every row.
        """
        if any(row.messages for row in rows):
            self.learn_stop_ids()
        found: list[Rendered | BadRow] = []
        groups = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        with ThreadPoolExecutor(max_workers=1) as aside:  # tokenizes one group while the next one is written
            running: tuple[Sequence[Row], list[_Written], Future[list[Tokenized | BadRow]]] | None = None
            for group in groups:
                written = [self._written(row) for row in group]
                if running is not None:
                    found += self._finished_many(running[0], running[1], running[2].result())
                running = group, written, aside.submit(self._pieces.tokenized_many, _texts(written))
            if running is not None:
                found += self._finished_many(running[0], running[1], running[2].result())
        return found

    def _one(self, row: Row) -> Rendered:
        written = [self._written(row)]
        [found] = self._finished_many([row], written, self._pieces.tokenized_many(_texts(written)))
        if isinstance(found, BadRow):
            raise found
        return found

    def _finished_many(
        self, rows: Sequence[Row], written: Sequence[_Written], tokens: Sequence[Tokenized | BadRow]
    ) -> list[Rendered | BadRow]:
        tokenized = iter(tokens)
        found: list[Rendered | BadRow] = []
        for row, item in zip(rows, written, strict=True):
            if isinstance(item, InputError):
                raise item
            made = item if isinstance(item, BadRow) else next(tokenized)
            if isinstance(item, BadRow) or isinstance(made, BadRow):
                found.append(cast(BadRow, made))
                continue
            spelled, known = item
            try:
                # A stop token that an earlier of these rows brought may change how this one is written.
                found.append(self._finished(row, spelled, made) if known == len(self.stop_ids) else self._one(row))
            except BadRow as error:
                found.append(error)
        return found

    def _written(self, row: Row) -> _Written:
        try:
            spelled = self._speller.spelled(row) if row.messages else Spelled(self._bos + row.text, [], [])
            return spelled, len(self.stop_ids)
        except TemplateRefused as error:
            refused = BadRow(f"the chat template refuses this conversation: {error}")
            refused.__cause__ = error
            return refused
        except (BadRow, InputError) as error:
            return error

    def _finished(self, row: Row, spelled: Spelled, tokens: Tokenized) -> Rendered:
        if not row.messages:
            return self._finished_text(row, self._pieces.encoded(spelled.text) if BREAK in spelled.text else tokens[0])
        ids, counts = tokens
        self._refuse_doubled_opening(ids, by_template=self.template.jinja is not None)
        weights = [1.0 if self.train_on == "everything" else 0.0] * len(ids)
        span = (0, 0)
        for turn in spelled.turns:
            start = counts[spelled.starts.index(turn.start)]
            span = (start, self._end_of_turn(ids, start, turn))
            weights[slice(*span)] = [turn.weight] * (span[1] - span[0])
        weights[0] = 0.0
        if row.messages[-1].get("tool_calls") and not row.references[0].strip():
            row = replace(row, references=(self._pieces.decoded(ids[span[0] : span[1] - 1]).strip(),))
        self._remember_stop(ids[span[1] - 1])
        return Rendered(row, self._example(row, ids, weights), tuple(ids[: span[0]]))

    def _finished_text(self, row: Row, ids: list[int]) -> Rendered:
        end = cast(int, self.tokenizer.eos_token_id)
        ids = ids if ids[-1:] == [end] else [*ids, end]
        self._refuse_doubled_opening(ids, by_template=False)
        return Rendered(row, self._example(row, ids, [0.0] + [1.0] * (len(ids) - 1)), ())

    def _example(self, row: Row, ids: list[int], weights: list[float]) -> Example:
        self.used_controls.update(self._speller.control_ids.intersection(ids))
        tokens = torch.from_numpy(numpy.array(ids, dtype=numpy.int64))  # a third of the time of torch.tensor(ids)
        counted = torch.from_numpy(numpy.array(weights, dtype=numpy.float32))
        return Example(tokens, {"target_weights": counted}, TOKEN_SCOPES, row.source)

    def _end_of_turn(self, ids: list[int], start: int, turn: Turn) -> int:
        """Position after the token that closes the answer which starts at ``start``."""
        closing = self._speller.controls[turn.closing]
        for _ in range(turn.answer.count(turn.closing)):
            try:
                start = ids.index(closing, start) + 1
            except ValueError:
                what = f"{turn.closing}, which closes an answer, is not tokenized as one token"
                raise BadRow(what) from None
        return start

    def _remember_stop(self, token: int) -> None:
        if token in self.stop_ids:
            return
        self.stop_ids.add(token)
        self.notes.append(
            f"the template closes answers with {self.tokenizer.convert_ids_to_tokens(token)}, which the model's own "
            "settings do not list as a stop token; generation stops there too"
        )

    def _look_at_controls(self) -> None:
        """Added tokens that the template writes without their being marked, and what only looks like a token."""
        text = self.template.text(_PROBE, generation_prompt=False)
        text += self.template.text(_PROBE[:1], generation_prompt=True)
        added = set(cast(dict[int, Any], getattr(self.tokenizer, "added_tokens_decoder", {})))
        self.used_controls |= added.intersection(self._pieces.encoded(text))
        if self.template.own or self.template.jinja in SPELLED_OUT:
            return
        for spelled in dict.fromkeys(_LIKE_CONTROL.findall(text)):
            count = len(self._pieces.encoded(spelled))
            if count > 1:
                self.notes.append(
                    f"the template writes {spelled}, which is no token of this vocabulary: it is read as {count} "
                    "ordinary pieces; choose another data.template or add the token"
                )

    def _refuse_doubled_opening(self, ids: list[int], *, by_template: bool) -> None:
        opening = self._opening
        if opening is not None and len(ids) > 1 and ids[0] == ids[1] == opening:
            what = f"the begin-of-text token {self.tokenizer.bos_token} stands twice"
            if by_template:
                raise InputError(f"{what} in what the template writes", where=WHERE, fix="remove one of them there")
            raise BadRow(f"{what}: it is put before every text, and this one brings its own")


def _texts(written: Sequence[_Written]) -> list[tuple[str, list[int]]]:
    return [(item[0].text, item[0].starts) for item in written if isinstance(item, tuple)]


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    named = json.dumps(
        [type(tokenizer).__name__, tokenizer.all_special_tokens, tokenizer.special_tokens_map], default=str
    )
    return sha256((spelled + named).encode("utf-8")).hexdigest()
