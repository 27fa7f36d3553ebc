"""Every rung, one after the other: how it asks, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.row import Row
from tunesmith.pipeline.ladder.asking import Asker
from tunesmith.pipeline.ladder.examples import Examples
from tunesmith.pipeline.ladder.scores import TUNED, Rung, Scoring
from tunesmith.pipeline.ladder.ways import Way, chained, plain, thinking, with_passages
from tunesmith.pipeline.retrieving import Library
from tunesmith.recipe_ladder import RUNGS, LadderSpec, RankerName, RungName

Chosen = tuple[Way, dict[str, Any]]
"""How a rung asks, and what was chosen for it."""


@dataclass
class Climb:
    """What the rungs need.

    Attributes:
        rows: held-out.
        limit: tokens of an answer.
        tuned_chooses: whether the tuned model has not seen the rows by which the number of examples is chosen.
        measured: rungs so far.
    """

    spec: LadderSpec
    rows: Sequence[Row]
    limit: int
    scoring: Scoring
    examples: Callable[[], Examples]
    library: Callable[[], Library]
    tuned_chooses: bool
    measured: list[Rung] = field(default_factory=list)

    def measure(self, asker: Asker, *, tuned: bool) -> None:
        """Measures the rungs of one model, in their order."""
        for name in RUNGS:
            if self.spec.runs(name) and (name in TUNED) == tuned:
                self.measured.append(self._measured(asker, name))

    def _measured(self, asker: Asker, name: RungName) -> Rung:
        way, settings = self._way(asker, name)
        answers = asker.answers(name, way, self.rows)
        fitting = [row for row, answer in zip(self.rows, answers, strict=True) if answer.fits]
        seconds = asker.seconds(name, way, fitting[: self.spec.latency_rows])
        return Rung(name, answers, seconds, way.searches, settings)

    def _way(self, asker: Asker, name: RungName) -> Chosen:
        spec, limit, instruction = self.spec, self.limit, self.spec.instruction
        if name == "zero-shot":
            return plain(limit, instruction), {}
        if name == "few-shot":
            return self._few_shot(asker, name, instruction)
        if name == "chain-of-thought":
            return thinking(spec, limit), {}
        if name == "chain":
            return chained(spec, limit), {"prompts": len(spec.chain)}
        if name == "tuned":
            return plain(limit), {}
        if name == "tuned-few-shot":
            return self._few_shot(asker, name, None)
        rankers: dict[str, RankerName] = {"rag-bm25": "bm25", "rag-dense": "dense", "rag-hybrid": "hybrid"}
        kind = rankers.get(name, "bm25" if spec.encoder == "off" else spec.tuned_retrieval)
        return self._retrieving(kind, None if name in TUNED else instruction)

    def _few_shot(self, asker: Asker, name: RungName, instruction: str | None) -> Chosen:
        examples = self.examples()
        base = next((rung.settings for rung in self.measured if rung.name == "few-shot"), None)
        if name in TUNED and not self.tuned_chooses and base is not None:
            # The tuned model was trained on the rows that are chosen by.
            count, settings = base["examples"], {"examples": base["examples"], "chosen_on": "as for few-shot"}
        elif name in TUNED and not self.tuned_chooses:
            count, settings = examples.counts[0], {"examples": examples.counts[0], "chosen_on": "the least asked for"}
        else:
            count, settings = examples.choose(asker, name, self.scoring, self.limit, instruction)
        return examples.way(count, self.limit, instruction), {**settings, "similarity": self.spec.similarity}

    def _retrieving(self, kind: RankerName, instruction: str | None) -> Chosen:
        library, count = self.library(), self.spec.passages
        way = with_passages(lambda query: library.find(kind, query, count), self.spec, self.limit, instruction)
        return way, {"retrieval": kind, "passages": count, "corpus": library.name, "texts": len(library.passages)}
