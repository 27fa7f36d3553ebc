"""What is known: the answers, and what the data file says where an answer is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from tunesmith.plan.advise.answers import Answers, Task
from tunesmith.plan.advise.data_look import DataLook

ENOUGH_ROWS = 1_000
"""Examples below which a tuned model learns the rows by heart (DONT, DATA_SIZES)."""
GOOD_ROWS = 10_000
MANY_ROWS = 100_000
"""Examples from which all weights may be trained (FULL)."""
ENOUGH_TEXT = 10_000_000
"""Tokens of raw text below which a model gains little from going on with pretraining; the sets for single tasks of
Gururangan et al. 2020, section 5, with which they still gain, begin at about this size."""
MUCH_TEXT = 10_000_000_000
"""Tokens that a new domain wants (PRETRAINING)."""
RETRIEVAL_MS = 150
"""Milliseconds until an answer begins when documents are looked up first (COSTS; the lookup alone is 100: WHEN)."""
MOVING = ("monthly", "weekly", "daily")
_TASKS: dict[str, Task] = {"labelled": "classify", "token-labels": "tag"}


@dataclass(frozen=True)
class Situation:
    """Answers and data as the rules read them."""

    answers: Answers
    data: DataLook | None = None

    @property
    def rows(self) -> int | None:
        """Examples that exist, as far as that is known; rows of raw text count where no language is to be learned."""
        if self.answers.examples is not None:
            return self.answers.examples
        return None if self.data is None or (self.data.is_text and self.language) else self.data.rows

    @property
    def tokens(self) -> int | None:
        """Tokens of raw text."""
        if self.answers.tokens is not None:
            return self.answers.tokens
        return self.data.tokens if self.data is not None and self.data.is_text else None

    @property
    def task(self) -> Task:
        told = _TASKS.get(self.data.format) if self.data is not None else None
        return self.answers.task or told or cast(Task, "generate")

    @property
    def facts(self) -> bool:
        """Whether answers depend on facts that the model cannot know or that move on."""
        return "facts" in self.answers.change or self.facts_move

    @property
    def facts_move(self) -> bool:
        return self.answers.knowledge_changes in MOVING

    @property
    def settled_facts(self) -> bool:
        """Whether somebody has said that the knowledge is stable."""
        return self.answers.knowledge_changes in ("never", "yearly")

    @property
    def form(self) -> bool:
        return bool({"style", "format", "behaviour"} & set(self.answers.change))

    @property
    def language(self) -> bool:
        return "domain-language" in self.answers.change

    @property
    def few_rows(self) -> bool:
        """Whether there are examples, and too few of them."""
        return self.rows is not None and self.rows < ENOUGH_ROWS and not self.shots_overflow

    @property
    def shots_overflow(self) -> bool:
        """Whether so many examples are needed in the prompt that they do not fit."""
        if self.answers.shots is None:
            return False
        words = 60 if self.data is None else self.data.median_prompt + self.data.median_answer
        return 1.33 * words * self.answers.shots > 0.75 * self.answers.context

    @property
    def much_text(self) -> bool:
        """Whether raw text is what there is to learn from: enough of it, or nothing else."""
        if self.tokens is not None:
            return self.tokens >= ENOUGH_TEXT
        return not self.form and self.rows is None

    @property
    def hurried(self) -> bool:
        return self.answers.latency is not None and self.answers.latency < RETRIEVAL_MS

    @property
    def prompting_tried(self) -> bool:
        return self.answers.prompting_tried or self.shots_overflow

    @property
    def nothing_tried(self) -> bool:
        """Whether somebody has said that no prompt was tried, which is more than not saying."""
        return self.answers.tried is not None and not self.prompting_tried

    @property
    def measured(self) -> bool:
        return self.answers.measured

    @property
    def unmeasurable(self) -> bool:
        """Whether somebody has said that nothing measures success."""
        return self.answers.metric == "none"

    @property
    def maintainable(self) -> bool:
        """Not said is not no."""
        return self.answers.maintained is not False
