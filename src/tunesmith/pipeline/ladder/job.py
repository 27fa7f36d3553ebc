"""What the ladder is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.models.measure import position_limit
from tunesmith.pipeline.ladder.asking import Asker, Store
from tunesmith.pipeline.loaded import Speaker
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.retrieving import Indexes, Library, open_library, row_passages
from tunesmith.pipeline.work import Watcher
from tunesmith.recipe import EvaluateSpec, Recipe
from tunesmith.recipe_ladder import LadderSpec


@dataclass(frozen=True)
class Job:
    """What is measured, and with what.

    Attributes:
        directory: of answers, runs and page.
    """

    spec: LadderSpec
    recipe: Recipe
    evaluate: EvaluateSpec
    planned: Planned
    directory: Path
    store: Store
    indexes: Indexes
    watcher: Watcher

    def asker(self, speaker: Speaker) -> Asker:
        positions = position_limit(self.planned.config)
        return Asker(speaker, positions, self.evaluate.batch_size, self.store, self.watcher.progress)

    def corpus(self) -> Library:
        """The corpus, or the training rows."""
        prepared, tokenizer = self.planned.prepared, self.planned.tokenizer
        assert prepared is not None and tokenizer is not None
        if self.spec.corpus is None:
            passages = row_passages([row for row in prepared.train.sources() if row.messages])
            return Library("the training rows", passages, self.indexes)
        return open_library(self.spec.corpus, tokenizer, self.indexes, self.spec.passage_tokens)
