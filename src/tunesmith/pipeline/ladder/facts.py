"""Facts, tuned in or looked up: what a model tells of them when it is asked as in training, and in other words.

A model that was tuned on questions and answers may have learned the questions' wording and not the facts (Allen-Zhu &
Li 2023, Physics of language models, part 3.1; Ovadia et al. 2024 compare tuning with retrieval).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tunesmith.base import InputError, Source
from tunesmith.data.read import Reading, open_records
from tunesmith.data.record import Record, RowErrors
from tunesmith.data.row import Row
from tunesmith.data.spec import DataSpec
from tunesmith.data.turns import with_system
from tunesmith.files import write_lines
from tunesmith.metrics import mean_rows, metric
from tunesmith.metrics.intervals import bootstrap
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.ladder.asking import Asker
from tunesmith.pipeline.ladder.job import Job
from tunesmith.pipeline.ladder.models import base_speaker, tuned_speaker
from tunesmith.pipeline.ladder.scores import paired
from tunesmith.pipeline.ladder.ways import Way, plain, with_passages
from tunesmith.pipeline.retrieving import Library
from tunesmith.recipe import Recipe
from tunesmith.recipe_ladder import FactsSpec, RankerName, filled

METRIC = "contains"
"""Models tell facts in sentences, tuned ones in a word: both are right when the answer stands there."""
LEAST_TOKENS = 48
"""Of an answer: room for a sentence."""
SEEN, OTHER = "as_trained", "in_other_words"
FACTS_FILE = "facts.jsonl"


@dataclass(frozen=True)
class Fact:
    """A question, its answers, and the same question in other words.

    Attributes:
        answers: each of which is right; the first one is trained on.
    """

    source: Source
    question: str
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...]


def read_facts(spec: FactsSpec) -> list[Fact]:
    """The facts of a file.

    Raises:
        InputError: for rows without question, answer or paraphrase, by file and line.
    """
    errors, found = RowErrors(), list[Fact]()
    for record in open_records(Reading(spec.data), errors):
        try:
            found.append(_fact(record, spec))
        except ValueError as error:
            errors.add(record.source, str(error))
    errors.raise_any("each row needs question, answer and paraphrases, or give templates: ladder.facts.paraphrases")
    if not found:
        raise InputError("the file holds no facts", where=spec.data, fix="name a file with at least one row")
    return found


def _fact(record: Record, spec: FactsSpec) -> Fact:
    question, answer = (record.fields.get(name) for name in ("question", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError("there is no question")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise ValueError("there is no answer")
    own = record.fields.get("paraphrases") or [filled(template, question=question) for template in spec.paraphrases]
    if isinstance(own, str) or not own or not all(isinstance(one, str) and one.strip() for one in own):
        raise ValueError("there is no list of paraphrases")
    if question in own:
        raise ValueError("a paraphrase is the question itself")
    return Fact(record.source, question, tuple(answers), tuple(own))


def probe_facts(job: Job, library: Library) -> dict[str, Any]:
    """Trains on the questions as they stand, and asks them in both wordings: base, base with retrieval, tuned, both.

    Raises:
        InputError: as `read_facts`.
    """
    spec = job.spec.facts
    assert spec is not None
    facts = read_facts(spec)
    chosen = sorted(Random(job.recipe.seed).sample(range(len(facts)), min(spec.questions, len(facts))))
    probe = _Probe(job, library, [facts[at] for at in chosen], _limit(job, facts))
    kind: RankerName = "bm25" if job.spec.encoder == "off" else "hybrid"
    instruction = job.spec.instruction

    def looked_up(instruction: str | None) -> Way:
        passages = job.spec.passages
        return with_passages(lambda text: library.find(kind, text, passages), job.spec, probe.limit, instruction)

    asker = job.asker(base_speaker(job.planned, job.watcher))
    found = {"base": probe.asked(asker, "base", plain(probe.limit, instruction))}
    found["rag"] = probe.asked(asker, "base with retrieval", looked_up(instruction))
    del asker
    gc.collect()
    run = finetune(_recipe(job, facts), resume=True, watcher=job.watcher)
    asker = job.asker(tuned_speaker(run.path, job.planned, job.watcher))
    found["tuned"] = probe.asked(asker, "tuned on the facts", plain(probe.limit))
    found["tuned_rag"] = probe.asked(asker, "tuned on the facts, with retrieval", looked_up(None))
    return {**probe.report(found), "facts": len(facts), "retrieval": kind, "corpus": library.name, "run": str(run.path)}


@dataclass(frozen=True)
class _Probe:
    job: Job
    library: Library
    facts: Sequence[Fact]
    limit: int

    def asked(self, asker: Asker, label: str, way: Way) -> dict[str, list[float]]:
        """For each wording, the share of right answers to each fact."""
        seen = [(at, fact.question) for at, fact in enumerate(self.facts)]
        other = [(at, text) for at, fact in enumerate(self.facts) for text in fact.paraphrases]
        return {
            SEEN: self._right(asker, f"facts: {label}, as trained", way, seen),
            OTHER: self._right(asker, f"facts: {label}, in other words", way, other),
        }

    def _right(self, asker: Asker, label: str, way: Way, questions: Sequence[tuple[int, str]]) -> list[float]:
        rows = [_row(self.facts[at], text, self.job.recipe.data.system) for at, text in questions]
        answers = asker.answers(label, way, rows)
        texts = [one.answer or "" for one in answers]
        right = metric(METRIC).rows(texts, [row.references for row in rows]).per_row()
        of_facts: list[list[float]] = [[] for _ in self.facts]
        for (at, _), score in zip(questions, right.tolist(), strict=True):
            of_facts[at].append(score)
        return [float(np.mean(scores)) for scores in of_facts]

    def report(self, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
        """Every share with its interval, and the three differences that decide."""
        spec, seed = self.job.evaluate, self.job.recipe.seed
        rows = []
        for name, by_wording in found.items():
            entry: dict[str, Any] = {"name": name}
            for wording, scores in by_wording.items():
                at = bootstrap(mean_rows(scores), resamples=spec.resamples, confidence=spec.confidence, seed=seed)
                entry[wording] = {"value": at.value, "low": at.low, "high": at.high, "n": at.n}
            rows.append(entry)

        def compare(before: tuple[str, str], after: tuple[str, str]) -> dict[str, Any]:
            first, second = (mean_rows(found[name][wording]) for name, wording in (before, after))
            return paired(first, second, spec, seed)

        differences = {
            "tuned_loses_in_other_words": compare(("tuned", SEEN), ("tuned", OTHER)),
            "rag_over_tuned_in_other_words": compare(("tuned", OTHER), ("rag", OTHER)),
            "tuned_over_base_in_other_words": compare(("base", OTHER), ("tuned", OTHER)),
        }
        return {
            "metric": METRIC,
            "asked": len(self.facts),
            "rows": rows,
            "differences": differences,
            "sentence": _sentence(rows, differences),
        }


def _sentence(rows: Sequence[dict[str, Any]], differences: dict[str, dict[str, Any]]) -> str:
    shares = {row["name"]: (row[SEEN]["value"], row[OTHER]["value"]) for row in rows}
    seen, other = shares["tuned"]
    against = differences["rag_over_tuned_in_other_words"]
    if against["low"] is None or against["low"] <= 0 <= against["high"]:
        verdict = "no difference to retrieval is shown"
    else:
        verdict = "retrieval is better" if against["difference"] > 0 else "tuning is better"
    return (
        f"Tuned on the facts, the model is right in {seen:.0%} when it is asked as it was trained, and in {other:.0%} "
        f"when it is asked in other words; with retrieval and no tuning it is right in {shares['rag'][1]:.0%} of "
        f"those: {verdict}."
    )


def _row(fact: Fact, question: str, system: str | None) -> Row:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": fact.answers[0]})
    return Row(fact.source, with_system(turns, system), references=fact.answers)


def _limit(job: Job, facts: Sequence[Fact]) -> int:
    """Tokens of an answer: one and a half times the longest, and at least a sentence's."""
    tokenizer = job.planned.tokenizer
    assert tokenizer is not None
    texts = [answer for fact in facts for answer in fact.answers]
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    return max(LEAST_TOKENS, longest * 3 // 2)


def _recipe(job: Job, facts: Sequence[Fact]) -> Recipe:
    """The recipe with the facts as its rows, each as it is asked, and nothing that needs other rows."""
    assert job.spec.facts is not None
    path: Path = job.directory / FACTS_FILE
    rows = ({"prompt": fact.question, "completion": fact.answers[0]} for fact in facts)
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    own = job.recipe
    data = DataSpec(train=str(path), system=own.data.system, template=own.data.template, checks=False)
    train = own.train.model_copy(
        update={
            "epochs": job.spec.facts.epochs,
            "steps": None,
            "evaluate_every": "auto",
            "generate_every": "off",
            "early_stopping": "off",
            "best": "last",
            "kl_on": "targets",
        }
    )
    update = {"data": data, "train": train, "evaluate": "off", "gate": {}, "output": str(job.directory / "facts")}
    return own.model_copy(update=update)
