"""The renderer of preference pairs: one row with the prompt once, and both answers behind it as segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.batch import NO_PARENT, Example
from tunesmith.data.formats import LAYOUTS, PROMPTS
from tunesmith.data.record import BadRow
from tunesmith.data.render import TOKEN_SCOPES, Rendered, Renderer
from tunesmith.data.row import Row

OTHERS = tuple(dict.fromkeys(name for name, _, _ in LAYOUTS if name != "preference")) + ("openassistant", PROMPTS[0])


@dataclass
class PairRenderer:
    """Turns preference pairs into examples by the renderer of single answers."""

    single: Renderer

    def __post_init__(self) -> None:
        self.notes = self.single.notes
        self.stop_ids = self.single.stop_ids
        self.used_controls = self.single.used_controls
        self.answers_optional = False
        self.template, self.tokenizer = self.single.template, self.single.tokenizer

    @property
    def name(self) -> str:
        return self.single.name

    @property
    def unused(self) -> tuple[str, ...]:
        return OTHERS

    def identity(self) -> dict[str, Any]:
        return {"pairs": self.single.identity()}

    def learn_stop_ids(self) -> None:
        self.single.learn_stop_ids()

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """Each pair rendered, or what is wrong with it."""
        better = self.single.render_many(rows)
        worse = self.single.render_many([_rejected(row) for row in rows])
        return [_pair(*both) for both in zip(rows, better, worse, strict=True)]


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
        return BadRow("both answers are the same")
    prompt = len(better.prompt_ids)
    parts = [item.example.token_ids[prompt:] for item in (better, worse)]
    weights = [item.example.tensors["target_weights"][prompt:] for item in (better, worse)]
    lengths = [len(part) for part in parts]
    segments = torch.tensor([[0, prompt, NO_PARENT], [prompt, lengths[0], 0], [prompt + lengths[0], lengths[1], 0]])
    example = Example(
        torch.cat([better.example.token_ids[:prompt], *parts]),
        {"target_weights": torch.cat([torch.zeros(prompt), *weights])},
        TOKEN_SCOPES,
        row.source,
        segments,
    )
    return Rendered(row, example, better.prompt_ids)
