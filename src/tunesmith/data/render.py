"""The one renderer, for training and for inference: a row becomes token ids and the weights of its targets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.batch import Example, Scope, Source
from tunesmith.data.rows import BadRow, Row
from tunesmith.models.templates import Template, TemplateRefused

TrainOn = Literal["answers", "last-answer", "everything"]
TOKEN_SCOPES: dict[str, Scope] = {"target_weights": "token"}


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
        self.special_ids = set(tokenizer.all_special_ids) | self.stop_ids
        self.notes: list[str] = []

    def learn_stop_ids(self) -> None:
        """Finds the token that closes an answer by rendering a short conversation, for models that only answer."""
        messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
        with suppress(BadRow):
            self.render(Row(Source("template", 1), messages, references=("Hello",)))

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the model answers."""
        try:
            return self._ids(self.template.text(messages, generation_prompt=True))
        except TemplateRefused as error:
            raise InputError(
                f"the chat template refuses this conversation: {error}", where=self.template.name
            ) from error

    def render(self, row: Row) -> Rendered:
        """Raises BadRow when the template refuses the row, or its targets cannot be told apart for certain."""
        if not row.messages:
            return self._render_text(row)
        full, turns = self._turns(row)
        ids, starts = self._ids_with_boundaries(full, [prefix for prefix, _ in turns])
        self._refuse_doubled_opening(ids)
        weights = torch.zeros(len(ids))
        bounds = [*starts[1:], len(ids)]
        for start, bound, (_, header) in zip(starts, bounds, turns, strict=True):
            end = self._end_of_turn(ids, start, bound)
            if header:
                raise BadRow("the template gives no generation prompt, so the header of the answer would be trained on")
            weights[start : end + 1] = 1.0
        if self.train_on == "last-answer":
            weights[: starts[-1]] = 0.0
        elif self.train_on == "everything":
            weights[:] = 1.0
        weights[0] = 0.0
        example = Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source)
        return Rendered(row, example, tuple(ids[: starts[-1]]))

    def _turns(self, row: Row) -> tuple[str, list[tuple[str, bool]]]:
        """The whole text; and for each trained turn the text before it, and whether a header would be a target."""
        messages = row.messages
        try:
            full = self.template.text(messages, generation_prompt=False)
            turns = []
            last = len(messages) - 1
            for index, message in enumerate(messages):
                if message["role"] != "assistant" or (self.train_on == "last-answer" and index != last):
                    continue
                prefix = self.template.text(messages[:index], generation_prompt=True)
                if not full.startswith(prefix):
                    raise BadRow(self._rewritten(index, last))
                bare = self.template.text(messages[:index], generation_prompt=False)
                lead = full[len(prefix) :].partition(message["content"])[0] if message["content"] else ""
                turns.append((prefix, prefix == bare and self.template.jinja is not None and bool(lead.strip())))
        except TemplateRefused as error:
            raise BadRow(f"the chat template refuses this conversation: {error}") from error
        return full, turns

    def _rewritten(self, index: int, last: int) -> str:
        if index == last:
            return (
                "the template renders this conversation for training and for generation in two ways: what the model "
                "would be given is no prefix of what it would be trained on"
            )
        return (
            f"the template rewrites earlier turns (turn {index + 1}), so they cannot be trained on as the model "
            "will see them; set data.train_on: last-answer"
        )

    def _render_text(self, row: Row) -> Rendered:
        text = self.template.bos if self.template.jinja is None else ""
        ids = [*self._ids(text + row.text), int(cast(int, self.tokenizer.eos_token_id))]
        self._refuse_doubled_opening(ids)
        weights = torch.ones(len(ids))
        weights[0] = 0.0
        return Rendered(row, Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source), ())

    def _ids(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_with_boundaries(self, full: str, prefixes: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of the whole, and where each answer starts.

        The ids before an answer must be those the model is given at inference. Where a token of the whole text
        straddles that boundary, the pieces are tokenized one after the other, and verified to spell the same text.
        """
        ids = self._ids(full)
        prefix_ids = [self._ids(prefix) for prefix in prefixes]
        if all(ids[: len(before)] == before for before in prefix_ids):
            return ids, [len(before) for before in prefix_ids]
        ids, starts, done = [], [], ""
        for prefix, after in zip(prefixes, [*prefixes[1:], full], strict=True):
            ids += self._continuation(ids, done, prefix)
            starts.append(len(ids))
            ids += self._continuation(ids, prefix, after)
            done = after
        if ids[: starts[0]] != prefix_ids[0]:
            raise BadRow("the prompt is tokenized differently in training and at inference")
        return ids, starts

    def _continuation(self, ids: list[int], done: str, goal: str) -> list[int]:
        """Token ids that spell ``goal[len(done):]`` after ``ids``."""
        piece = self._ids(goal[len(done) :])
        for candidate in (piece, piece[1:]):  # some tokenizers open every text with a blank of their own
            if self._decoded([*ids, *candidate]) == self._decoded(self._ids(goal)):
                return candidate
        raise BadRow("the answer cannot be tokenized apart from its prompt")

    def _decoded(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _end_of_turn(self, ids: list[int], start: int, bound: int) -> int:
        """Position of the token that closes the answer which starts at ``start``."""
        for position in range(start, bound):
            if ids[position] in self.stop_ids:
                return position
        for position in range(bound - 1, start - 1, -1):
            if ids[position] in self.special_ids:
                self.stop_ids.add(ids[position])
                token = self.tokenizer.convert_ids_to_tokens(ids[position])
                self.notes.append(
                    f"the template closes answers with {token}, which the model's own settings do not list "
                    "as a stop token; generation stops there too"
                )
                return position
        raise BadRow("the template never closes an answer with a stop token: the model would not learn to stop")

    def _refuse_doubled_opening(self, ids: list[int]) -> None:
        opening = self.tokenizer.bos_token_id
        if opening is not None and len(ids) > 1 and ids[0] == ids[1] == opening:
            raise BadRow("the begin-of-text token stands twice: the template writes it, and the text brings its own")
