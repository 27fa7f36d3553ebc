"""Renderers of preferences: pairs, with the prompt once and both answers behind it as segments, and single answers of
which it is known whether they are good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tunesmith.base import InputError
from tunesmith.batch import Example, Scope, answers_behind
from tunesmith.data.formats import LAYOUTS, PROMPTS
from tunesmith.data.record import BadRow, RowErrors
from tunesmith.data.render import TOKEN_SCOPES, Rendered, Renderer
from tunesmith.data.row import SAME_ANSWERS, Row
from tunesmith.data.rows import open_rows
from tunesmith.data.sources import readings
from tunesmith.data.spec import DataSpec
from tunesmith.models.templates import Template

DESIRABLE = "desirable"
"""Name of the tensor that says of a row whether its answer is good: fp32 ``[1]``, 1 or 0."""
PAIRS = ("preference", "rated")
LABELLED = ("unpaired",)


def _other_formats(used: Sequence[str]) -> tuple[str, ...]:
    return (*dict.fromkeys(name for name, _, _ in LAYOUTS if name not in used), "openassistant", PROMPTS[0])


@dataclass
class PairRenderer:
    """Turns preference pairs into examples by the renderer of single answers, whose `train_on` is the last answer."""

    single: Renderer

    formats: ClassVar[tuple[str, ...]] = PAIRS
    in_blocks: ClassVar[bool] = False
    answers_optional: bool = False

    def __post_init__(self) -> None:
        self.notes = self.single.notes
        self.stop_ids = self.single.stop_ids
        self.used_controls = self.single.used_controls

    @property
    def name(self) -> str:
        return self.single.name

    @property
    def template(self) -> Template:
        return self.single.template

    @property
    def unused(self) -> tuple[str, ...]:
        return _other_formats(self.formats)

    def identity(self) -> dict[str, Any]:
        return {type(self).__name__: self.single.identity()}

    def learn_stop_ids(self) -> None:
        self.single.learn_stop_ids()

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """Each pair rendered, or what is wrong with it."""
        better = self.single.render_many(rows)
        worse = self.single.render_many([_rejected(row) for row in rows])
        return [_pair(*both) for both in zip(rows, better, worse, strict=True)]


class RewardRenderer(PairRenderer):
    """Renders pairs of which a number is read at the last token of each answer."""

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        return [item if isinstance(item, BadRow) else _read_at_ends(item) for item in super().render_many(rows)]


def _read_at_ends(item: Rendered) -> Rendered:
    example = item.example
    assert example.segments is not None
    weights = torch.zeros(len(example))
    weights[[start + length - 1 for start, length, _ in example.segments[1:].tolist()]] = 1.0
    return replace(item, example=replace(example, tensors={"target_weights": weights}))


class AnswerRenderer(PairRenderer):
    """Renders single answers of which it is known whether they are good."""

    formats = LABELLED

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        return [_plain(item) for item in self.single.render_many(rows)]


def _plain(item: Rendered | BadRow) -> Rendered | BadRow:
    """A turn's own weight says how much it is imitated, not how much it is compared."""
    if isinstance(item, BadRow):
        return item
    weights = (item.example.tensors["target_weights"] > 0).float()
    return replace(item, example=replace(item.example, tensors={"target_weights": weights}))


def with_partner(item: Rendered, other: Rendered, limit: int) -> Rendered:
    """A row with the answer of another one behind its prompt, after its own; both are targets.

    Args:
        limit: the most positions of the prompt with the other answer, which is cut to them.
    """
    prompt, first = len(item.prompt_ids), len(other.prompt_ids)
    own, foreign = item.example, other.example
    answer = slice(first, first + max(1, limit - prompt))
    ids = torch.cat([own.token_ids, foreign.token_ids[answer]])
    weights = torch.cat([own.tensors["target_weights"], foreign.tensors["target_weights"][answer]])
    segments = answers_behind(prompt, len(own), len(ids))
    good = torch.tensor([float(bool(item.row.desirable))])
    tensors = {"target_weights": weights, DESIRABLE: good}
    scopes: dict[str, Scope] = {**TOKEN_SCOPES, DESIRABLE: "row"}
    return replace(item, example=Example(ids, tensors, scopes, own.source, segments))


def holds_pairs(spec: DataSpec) -> bool:
    """Whether the file's rows are preference pairs."""
    return open_rows(readings(spec)[0][0], RowErrors()).format in PAIRS


def over_last_answers(renderer: Renderer) -> Renderer:
    """A renderer by the same template in which last answers alone are targets."""
    return Renderer(renderer.template, renderer.tokenizer, "last-answer", set(renderer.stop_ids))


def refuse_settings_of_imitation(spec: DataSpec) -> None:
    """Raises InputError for what only answers that are imitated have."""
    given = DataSpec(train="")
    if spec.train_on not in (given.train_on, "last-answer"):
        raise InputError("only the last answers of a preference are compared", where="data.train_on", fix="remove it")
    if spec.answer_after != given.answer_after:
        raise InputError("is about raw text, and preferences need columns", where="data.answer_after", fix="remove it")


def _rejected(row: Row) -> Row:
    return replace(row, messages=row.rejected, references=(row.rejected[-1]["content"],), rejected=())


def _pair(row: Row, better: Rendered | BadRow, worse: Rendered | BadRow) -> Rendered | BadRow:
    if isinstance(better, BadRow):
        return better
    if isinstance(worse, BadRow):
        return BadRow(f"the rejected answer: {worse}")
    if better.prompt_ids != worse.prompt_ids:
        return BadRow("the prompt is written otherwise before the rejected answer than before the chosen one")
    if better.example.token_ids.tolist() == worse.example.token_ids.tolist():
        return BadRow(SAME_ANSWERS)
    prompt, other = len(better.prompt_ids), len(better.example)
    ids = torch.cat([better.example.token_ids, worse.example.token_ids[prompt:]])
    weights = torch.cat([better.example.tensors["target_weights"], worse.example.tensors["target_weights"][prompt:]])
    weights = (weights > 0).float()  # a turn's own weight says how much it is imitated
    if not weights[prompt:other].any() or not weights[other:].any():
        return BadRow("an answer of the pair has the weight 0")
    segments = answers_behind(prompt, other, len(ids))
    example = Example(ids, {"target_weights": weights}, TOKEN_SCOPES, row.source, segments)
    return Rendered(row, example, better.prompt_ids)
