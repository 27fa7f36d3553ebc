"""The renderer of prompts that the model answers by itself, for objectives that train on what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tunesmith.base import InputError
from tunesmith.batch import Example
from tunesmith.data.record import BadRow
from tunesmith.data.render import TOKEN_SCOPES, Rendered, Renderer
from tunesmith.data.row import Row


@dataclass
class PromptRenderer:
    """Turns rows into prompts, by the renderer of conversations; reference answers are left to whoever scores.

    The only target of such an example is the prompt's last token, behind which an answer begins.
    """

    single: Renderer
    in_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.notes = self.single.notes
        self.stop_ids = self.single.stop_ids
        self.used_controls = self.single.used_controls
        self.answers_optional = True
        self.unused = ("preference", "token-labels", "text")
        self.template, self.tokenizer = self.single.template, self.single.tokenizer

    @property
    def name(self) -> str:
        return self.single.name

    def identity(self) -> dict[str, Any]:
        return {"prompts": self.single.identity()}

    def learn_stop_ids(self) -> None:
        self.single.learn_stop_ids()

    def render_many(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """Each prompt rendered, or what is wrong with it."""
        return [self._rendered(row) for row in rows]

    def _rendered(self, row: Row) -> Rendered | BadRow:
        try:
            ids = self.single.prompt_ids(row.messages[:-1], row.tools)
        except InputError as error:
            return BadRow(error.what)
        weights = torch.zeros(len(ids))
        weights[-1] = 1.0
        example = Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES, row.source)
        return Rendered(row, example, tuple(ids))
