"""A reward model at work: what it says of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tunesmith.base import InputError, silent
from tunesmith.batch import Example
from tunesmith.data.record import BadRow
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.evaluation.answers import turns_text
from tunesmith.evaluation.labels import outputs_of_rows
from tunesmith.models.forward import packing_obstacle
from tunesmith.pipeline.labeller import Labeller
from tunesmith.pipeline.loaded import load_labeller, locate


@dataclass
class ByModel:
    """A reward model, loaded when it is first asked.

    Attributes:
        path: as the recipe names it.
        dtype: of its frozen weights, as `load` takes it.
    """

    path: str
    dtype: str = "auto"
    _labeller: Labeller | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        head = locate(self.path).head
        if head is None or head.problem != "regression" or len(head.labels) != 1:
            raise InputError(
                "this model gives no single number",
                where=self.path,
                fix="name a run of objective.kind: regress or another model with a head for one number",
            )

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        if self._labeller is None:
            self._labeller = load_labeller(self.path, dtype=self.dtype)
        asked = self._labeller
        assert asked is not None
        examples = _examples(asked, rows, answers)
        items = [Rendered(row, example, ()) for row, example in zip(rows, examples, strict=True)]
        packed = packing_obstacle(asked.model) is None
        outputs = dict(outputs_of_rows(asked.model, asked.objective, items, packed=packed, progress=silent))
        return [float(outputs[at][0, 0]) for at in range(len(items))]

    def share(self, model: nn.Module) -> int:
        """Keeps frozen weights that both models hold once, and says how many those are.

        Args:
            model: the trained one, adapted.
        """
        if self._labeller is None:
            self._labeller = load_labeller(self.path, dtype=self.dtype)
        assert self._labeller is not None
        held = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
        shared = 0
        for name, weight in self._labeller.model.named_parameters():
            twin = held.get(name)
            alike = twin is not None and (twin.shape, twin.dtype) == (weight.shape, weight.dtype)
            if twin is not None and alike and torch.equal(twin, weight):
                weight.requires_grad_(False)
                weight.data = twin.data
                shared += weight.numel()
        return shared


def _examples(asked: Labeller, rows: Sequence[Row], answers: Sequence[str]) -> list[Example]:
    """Prompt and answer as the model reads them: a conversation, or one text with a blank line between."""
    conversation = asked.renderer.conversation
    if conversation is None:
        pairs = zip(rows, answers, strict=True)
        return asked.rendered([f"{turns_text(row.messages[:-1])}\n\n{answer}" for row, answer in pairs])
    said = [_answered(row, answer) for row, answer in zip(rows, answers, strict=True)]
    found = []
    for row, item in zip(rows, conversation.render_many(said), strict=True):
        if isinstance(item, BadRow):
            raise InputError(f"the reward model cannot read an answer: {item}", where=str(row.source))
        weights = torch.zeros(len(item.example))
        weights[-1] = 1.0
        found.append(replace(item.example, tensors={"target_weights": weights}))
    return found


def _answered(row: Row, answer: str) -> Row:
    turn = {"role": "assistant", "content": answer}
    return replace(row, messages=(*row.messages[:-1], turn), references=(answer,))
