"""Examples for a prompt: the training rows most like the question, and how many of them serve best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.base import InputError
from tunesmith.data.row import Row
from tunesmith.evaluation.compare import better_way
from tunesmith.pipeline.ladder.asking import Asker
from tunesmith.pipeline.ladder.scores import Scoring
from tunesmith.pipeline.ladder.ways import Way, with_examples
from tunesmith.pipeline.retrieving import Indexes, asked
from tunesmith.recipe_ladder import LadderSpec
from tunesmith.retrieve.ranking import best


class Examples:
    """Training rows that may stand in a prompt.

    Args:
        pool: those rows, none of which is judged or chosen by.
        chosen_by: rows on which the number of examples is chosen.
        chosen_from: where those came from, in words.

    Raises:
        InputError: when there are fewer rows than the least number of examples.
    """

    def __init__(
        self, spec: LadderSpec, pool: Sequence[Row], chosen_by: Sequence[Row], chosen_from: str, indexes: Indexes
    ) -> None:
        self._spec, self._pool, self._chosen_by, self._indexes = spec, pool, chosen_by, indexes
        self.chosen_from = chosen_from
        self.counts = sorted({count for count in spec.shots if count <= len(pool)})
        self._found: dict[tuple[str, str], list[Row]] = {}
        if not self.counts:
            raise InputError(
                f"{min(spec.shots)} examples are asked for, and {len(pool)} training rows are there",
                where="ladder.shots",
                fix="ask for fewer",
            )

    def like(self, row: Row, count: int) -> list[Row]:
        """The training rows most like a row's question, the most alike last, where the model reads them best."""
        key = str(row.source), row.prompt_key
        if key not in self._found:
            ranker = self._indexes.ranker(self._spec.similarity, [asked(example) for example in self._pool])
            found = best(ranker.scores(asked(row)), max(self.counts))
            self._found[key] = [self._pool[at] for at in found]
        return self._found[key][:count][::-1]

    def way(self, count: int, limit: int, instruction: str | None) -> Way:
        return with_examples(lambda row: self.like(row, count), limit, instruction)

    def choose(
        self, asker: Asker, label: str, scoring: Scoring, limit: int, instruction: str | None
    ) -> tuple[int, dict[str, Any]]:
        """The number of examples that scores best on the rows to choose by; of equal ones the smallest.

        Returns:
            The number, and what each one scored.
        """
        if len(self.counts) == 1:
            return self.counts[0], {"examples": self.counts[0]}
        sign, scores = 1 if better_way(scoring.metrics[0]) == "higher" else -1, dict[int, float]()
        for count in self.counts:
            way = self.way(count, limit, instruction)
            answers = asker.answers(f"{label}, {count} examples, rows to choose by", way, self._chosen_by)
            scores[count] = scoring.value(self._chosen_by, answers)
        chosen = max(self.counts, key=lambda count: sign * scores[count])
        tried = {str(count): score for count, score in scores.items()}
        return chosen, {"examples": chosen, "tried": tried, "chosen_on": self.chosen_from}
