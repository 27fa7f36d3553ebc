"""A trained model that judges, at work: rows of a file, or single texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, Source, silent
from tunesmith.batch import Example
from tunesmith.data.prepare import prepare
from tunesmith.data.record import BadRow
from tunesmith.data.render import Rendered
from tunesmith.data.render_labelled import LabelRenderer
from tunesmith.data.render_pairs import PairRenderer, RewardRenderer, holds_pairs, over_last_answers
from tunesmith.data.row import Row
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.answers import Judged, chosen_rows
from tunesmith.evaluation.labels import judge_labels, outputs_of_rows
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.measure import position_limit
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives import Classify, Regress, Reward, TaskObjective
from tunesmith.objectives.task import objective_of
from tunesmith.pipeline.judging import label_renderer, labelled, refuse_wrong_labels
from tunesmith.pipeline.own_metrics import OwnMetrics
from tunesmith.recipe import EvaluateSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Said:
    """What a model says of one text.

    Attributes:
        answer: the label, several of them, the labels of the words, or the number.
        probability: of the label; None where the answer is not one label.
    """

    answer: str
    probability: float | None


@dataclass(frozen=True)
class Labeller:
    """A model that judges, with what it takes to ask it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    objective: TaskObjective
    renderer: LabelRenderer

    @classmethod
    def of(cls, model: PreTrainedModel, head: TaskHead, tokenizer: PreTrainedTokenizerBase) -> Labeller:
        objective = objective_of(head)
        # A conversation is written by the template that was saved with the tokenizer.
        spec = DataSpec(train="", template="auto")
        renderer = label_renderer(objective, spec, tokenizer, model, set(), in_conversation=head.asks == "conversation")
        return cls(model, tokenizer, objective, renderer)

    def say(self, texts: Sequence[str], progress: Progress = silent) -> list[Said]:
        """Judges texts; those whose words are labelled are parted at blanks."""
        items = self._items(texts)
        found = dict(outputs_of_rows(self.model, self.objective, items, packed=self._packs(), progress=progress))
        return [self._said(found[at]) for at in range(len(items))]

    def rendered(self, texts: Sequence[str]) -> list[Example]:
        """Texts as the model reads them. Raises InputError for one of which nothing is left."""
        return [item.example for item in self._items(texts)]

    def _items(self, texts: Sequence[str]) -> list[Rendered]:
        found = self.renderer.render_many([self._row(text, at) for at, text in enumerate(texts, start=1)])
        items: list[Rendered] = []
        for text, item in zip(texts, found, strict=True):
            if isinstance(item, BadRow):
                raise InputError(str(item), where=repr(text[:40]))
            items.append(item)
        return items

    def _row(self, text: str, at: int) -> Row:
        if self.objective.words:
            return Row(Source("text", at), words=tuple(text.split()))
        turns = ({"role": "user", "content": text}, {"role": "assistant", "content": ""})
        return Row(Source("text", at), turns, references=("",))

    def _said(self, outputs: torch.Tensor) -> Said:
        alone = isinstance(self.objective, Classify) and not self.objective.multi_label
        probability = float(outputs[0].softmax(0).max()) if alone else None
        return Said(self.objective.answer(outputs), probability)

    def _packs(self) -> bool:
        return packing_obstacle(self.model) is None

    def judged_rows(
        self, data: DataSpec, spec: EvaluateSpec, progress: Progress = silent
    ) -> tuple[list[Judged], list[str]]:
        """Every row as the model dealt with it, and the metrics that fit the rows."""
        settings = {"duplicates": "keep", "test": "auto", "validation": None, "checks": False, "template": "auto"}
        objective: TaskObjective = self.objective
        renderer: LabelRenderer | PairRenderer = self.renderer
        conversation = self.renderer.conversation
        if isinstance(objective, Regress) and conversation is not None and holds_pairs(data):
            objective, renderer = Reward(layer=objective.layer), RewardRenderer(over_last_answers(conversation))
        prepared = prepare(
            data.model_copy(update=settings),
            renderer,
            model_limit=position_limit(self.model.config),
            seed=0,
            wants_test=False,
            progress=progress,
        )
        refuse_wrong_labels(prepared.train, objective, "given")
        rows = chosen_rows(labelled(prepared.train, objective), spec.rows, 0)
        metrics = list(objective.metrics) if spec.metrics == "auto" else list(spec.metric_names)
        own = OwnMetrics.of(spec.own_metrics)
        judged = judge_labels(self.model, objective, rows, packed=self._packs(), progress=progress)
        return own.scored(judged), metrics
