"""The memorisation probe of a job: which training rows are asked, what is kept of the answers, what comes of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.data.stored import RenderedRows
from tunesmith.engine.generate import Sampling, generate
from tunesmith.evaluation.answers import Evaluation, Judged, Judging, prompt_text, turns_text
from tunesmith.evaluation.details import SURE, details_of, says
from tunesmith.evaluation.memorisation import FEWEST, WINDOW, Passage, Probed, Said, memorisation_summary
from tunesmith.objectives import Policy, Pretrain
from tunesmith.pipeline.planning import Planned
from tunesmith.recipe import EvaluateSpec

KEY = "evaluate.memorisation"
SCANNED = 5_000
"""Training rows that are looked at for rare answers and for details: enough to find some, few enough to be quick."""


@dataclass(frozen=True)
class Probe:
    """Rows that are asked, and those that were not trained on.

    Attributes:
        sample: training rows drawn at random among those whose answers are long and rare enough.
        personal: further training rows, whose answers hold details that their prompts do not.
        held_out: rows of the evaluation.
        left_out: of the rows that were looked at, how many answers are too short, and how many several rows share.
    """

    sample: list[Rendered]
    personal: list[Rendered]
    held_out: list[Rendered]
    left_out: dict[str, int]
    tokenizer: PreTrainedTokenizerBase
    how: Judging

    @property
    def window(self) -> int:
        """Tokens of an answer that can be compared."""
        return min(WINDOW, self.how.max_new_tokens)

    def ask(self, model: nn.Module, progress: Progress) -> dict[str, Any]:
        """What a model answers to the prompts, as it is stored; held-out rows only where the evaluation does not."""
        rows = [*self.sample, *self.personal, *([] if self.how.generates else self.held_out)]
        found = generate(
            model,
            [row.prompt_ids for row in rows],
            Sampling(self.how.max_new_tokens),
            stop_ids=set(self.how.stop_ids),
            batch_size=self.how.batch_size,
            progress=lambda _, done, total: progress("asking for training answers", done, total),
        )
        texts = [cast(str, self.tokenizer.decode(one.token_ids, skip_special_tokens=True)) for one in found]
        trained = len(self.sample) + len(self.personal)
        return {"trained": texts[:trained], "held_out": None if self.how.generates else texts[trained:]}

    def summary(self, base: Evaluation, tuned: Evaluation, confidence: float) -> dict[str, Any]:
        """The report's section, from what is stored of both models."""
        if base.get("memorisation") is None or tuned.get("memorisation") is None:
            return not_measured("the run holds no answers to training prompts", asked=True)
        parts = [self._said(evaluation) for evaluation in (base, tuned)]
        groups = [self.sample, self.personal, self.held_out]
        # Who answers alike is told by the rows that were not drawn too; a held-out one by its fellows.
        shared = Counter(folded(row.row) for row in self.held_out)
        probed = [
            Probed(self._passages(rows, shared if at == 2 else Counter()), parts[0][at], parts[1][at])
            for at, rows in enumerate(groups)
        ]
        found = memorisation_summary(probed[0], probed[1], probed[2], window=self.window, confidence=confidence)
        return {**found, "left_out": self.left_out}

    def _said(self, evaluation: Evaluation) -> list[list[Said]]:
        stored = evaluation["memorisation"]
        held = stored["held_out"]
        if held is None:
            held = [Judged(**row).answer or "" for row in evaluation["rows"]]
        split = len(self.sample)
        return [self._compared(texts) for texts in (stored["trained"][:split], stored["trained"][split:], held)]

    def _compared(self, texts: Sequence[str]) -> list[Said]:
        return [Said(text, ids) for text, ids in zip(texts, openings(self.tokenizer, texts, self.window), strict=True)]

    def _passages(self, rows: Sequence[Rendered], shared: Counter[str]) -> list[Passage]:
        answers = [row.row.references[0] if row.row.references else "" for row in rows]
        found = []
        for row, answer, ids in zip(rows, answers, openings(self.tokenizer, answers, self.window), strict=True):
            start = cast(str, self.tokenizer.decode(list(ids))).rstrip("\ufffd")  # half a letter at the end
            counts = len(ids) >= FEWEST and shared[folded(row.row)] < 2
            found.append(Passage(str(row.row.source), prompt_text(row), answer, ids, start, counts))
        return found


def not_measured(reason: str, *, asked: bool = False) -> dict[str, Any]:
    """The report's section where nothing was measured; it is warned of where the recipe asked for it."""
    status, warnings = ("could_not_run", [f"memorisation was not measured: {reason}"]) if asked else ("off", [])
    return {"status": status, "reason": reason, "warnings": warnings, "remark": None}


def with_remark(sentence: str, section: dict[str, Any]) -> str:
    """The verdict's sentence, with what was found where it is a reason to look."""
    return f"{sentence[:-1]}; {section['remark']}." if section["remark"] else sentence


def probe_of(planned: Planned, spec: EvaluateSpec, held_out: list[Rendered], how: Judging) -> Probe | str:
    """The rows of the probe, or why there is none.

    Raises:
        InputError: when a recipe asks for what its kind of job cannot show.
    """
    if spec.memorisation == "off":
        return f"{KEY} is off"
    assert planned.prepared is not None and planned.tokenizer is not None
    why = _obstacle(planned, how, by_itself=spec.memorisation == "auto")
    if why is not None:
        if spec.memorisation != "auto":
            raise InputError(f"memorisation cannot be probed: {why}", where=KEY, fix="remove it, or set it off")
        return why
    draw = random.Random(f"memorisation {planned.recipe.seed}")
    found = _drawn(planned.prepared, planned.tokenizer, min(WINDOW, how.max_new_tokens), spec.probed_rows, draw)
    sample, personal, left_out = found
    if not sample and not personal:
        return (
            f"no training answer has {FEWEST} tokens, is given once and has a prompt ({left_out['short']} too short, "
            f"{left_out['shared']} shared by several rows)"
        )
    return Probe(sample, personal, held_out, left_out, planned.tokenizer, how)


def _obstacle(planned: Planned, how: Judging, *, by_itself: bool) -> str | None:
    """Why a job's training answers cannot be asked for, or, where nobody asks, should not be."""
    if planned.judges is not None:
        return "the model judges, and writes nothing"
    if isinstance(planned.objective, Pretrain):
        return "documents have no prompts to be asked by"
    if isinstance(planned.objective, Policy):
        return "it learns from its own answers, not from those of the rows"
    if how.max_new_tokens < FEWEST:
        return f"answers end at {how.max_new_tokens} tokens (evaluate.max_new_tokens), and {FEWEST} are needed"
    if by_itself and not how.generates:
        return f"no answers are written for the metrics; ask with {KEY}: {{rows: 64}}"
    return None


def _drawn(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, window: int, count: int, draw: random.Random
) -> tuple[list[Rendered], list[Rendered], dict[str, int]]:
    """Rows for the rate and rows with details, and how many were left out and why."""
    numbers = np.unique(prepared.train.numbers).tolist()
    numbers = sorted(draw.sample(numbers, min(SCANNED, len(numbers))))
    rows = [row for row in _asked(prepared.train, numbers) if row[1].messages]
    shared = Counter(folded(row) for _, row in rows)
    lengths = [len(ids) for ids in openings(tokenizer, [row.references[0] for _, row in rows], window)]
    left_out = {"short": 0, "shared": 0}
    fit: list[int] = []
    for (number, row), length in zip(rows, lengths, strict=True):
        if length < FEWEST:
            left_out["short"] += 1
        elif shared[folded(row)] > 1:
            left_out["shared"] += 1
        else:
            fit.append(number)
    chosen = sorted(draw.sample(fit, min(count, len(fit))))
    telling = [number for number, row in rows if number not in set(chosen) and _tells(row)]
    more = sorted(draw.sample(telling, min(count, len(telling))))
    stored = prepared.train.stored
    return [stored.rendered(at) for at in chosen], [stored.rendered(at) for at in more], left_out


def _asked(train: RenderedRows, numbers: list[int]) -> list[tuple[int, Row]]:
    """Rows that bring an answer to learn; a bad one of a pair of labels is not learned."""
    return [
        (number, row)
        for number, row in train.stored.rows.read(numbers)
        if row.references and row.references[0].strip() and row.desirable is not False
    ]


def _tells(row: Row) -> bool:
    """Whether an answer holds something of a sure kind that its prompt does not."""
    answer = row.references[0]
    found = [detail for detail in details_of(answer) if detail.kind in SURE]
    prompt = turns_text(row.messages[:-1]) if found else ""
    return any(not says(prompt, detail) for detail in found)


def folded(row: Row) -> str:
    """An answer as it is compared with other rows'."""
    return " ".join((row.references[0] if row.references else "").casefold().split())


def openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int) -> list[tuple[int, ...]]:
    """Ids of the first tokens of every text, by themselves."""
    if not texts:
        return []
    ids = cast(list[list[int]], tokenizer([text.strip() for text in texts], add_special_tokens=False)["input_ids"])
    return [tuple(one[:window]) for one in ids]
