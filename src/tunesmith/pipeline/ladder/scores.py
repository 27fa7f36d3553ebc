"""From answers to the table: every rung with its interval, against zero-shot, and the lowest that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.base import InputError
from tunesmith.data.row import Row
from tunesmith.evaluation.answers import Judged, turns_text
from tunesmith.evaluation.compare import better_way, metric_rows
from tunesmith.metrics import RowStatistics, bootstrap, holm, paired_bootstrap, paired_test
from tunesmith.pipeline.ladder.asking import Answered
from tunesmith.pipeline.own_metrics import NO_METRICS, OwnMetrics
from tunesmith.plan.advise.cost import ServingPrices
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_ladder import RungName

TUNED = ("tuned", "tuned-few-shot", "tuned-rag")


@dataclass(frozen=True)
class Rung:
    """What was measured of one way.

    Attributes:
        seconds: of the rows that were asked one at a time.
        searches: of a corpus, for each row.
        settings: what was chosen for it, such as the number of examples.
    """

    name: RungName
    answers: Sequence[Answered]
    seconds: Sequence[float]
    searches: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How rungs are scored.

    Attributes:
        metrics: the deciding one first.
        own: those that the recipe brings along.
    """

    metrics: Sequence[str]
    spec: EvaluateSpec
    seed: int
    prices: ServingPrices
    own: OwnMetrics = NO_METRICS

    def judged(self, rows: Sequence[Row], answers: Sequence[Answered]) -> list[Judged]:
        """Rows with their answers; one without an answer counts as an empty one."""
        return self.own.scored(
            [
                Judged(
                    source=str(row.source),
                    prompt=turns_text(row.messages[:-1]),
                    references=list(row.references),
                    answer=one.answer or "",
                    finish_reason=one.finish_reason,
                    nll=None,
                    targets=0,
                )
                for row, one in zip(rows, answers, strict=True)
            ]
        )

    def value(self, rows: Sequence[Row], answers: Sequence[Answered]) -> float:
        """The deciding metric.

        Raises:
            InputError: when it says nothing of these rows.
        """
        return self._statistics(self.metrics[0], self.judged(rows, answers)).corpus()

    def entries(self, rows: Sequence[Row], rungs: Sequence[Rung]) -> list[dict[str, Any]]:
        """The lines of the table; differences are to zero-shot, with p-values that are corrected for being several."""
        judged = {rung.name: self.judged(rows, rung.answers) for rung in rungs}
        zero = judged.get("zero-shot")
        found = [self._entry(rung, judged[rung.name], zero) for rung in rungs]
        compared = [entry["difference"] for entry in found if entry["difference"] is not None]
        for one, p in zip(compared, holm([one["p"] for one in compared]), strict=True):
            one["p_corrected"] = p
        return found

    def _entry(self, rung: Rung, judged: list[Judged], zero: list[Judged] | None) -> dict[str, Any]:
        prompt = _mean([one.prompt_tokens for one in rung.answers])
        completion = _mean([one.completion_tokens for one in rung.answers])
        median, slow = (float(np.quantile(rung.seconds, q)) if rung.seconds else None for q in (0.5, 0.9))
        cost = self.prices.of_query(prompt, completion, rung.searches, _mean(rung.seconds) if rung.seconds else None)
        scores = [self._scored(name, judged, None if judged is zero else zero) for name in self.metrics]
        return {
            "name": rung.name,
            "model": "tuned" if rung.name in TUNED else "base",
            **{key: value for key, value in scores[0].items() if key != "name"},
            "metrics": scores,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "latency": {"median": median, "p90": slow, "n": len(rung.seconds)},
            "cost_per_1000": None if cost is None else 1000 * cost,
            "did_not_fit": sum(not one.fits for one in rung.answers),
            "without_answer": sum(one.fits and one.answer is None for one in rung.answers),
            "cut_off": sum(one.fits and one.finish_reason == "length" for one in rung.answers),
            "rows": len(rung.answers),
            "settings": rung.settings,
        }

    def _scored(self, name: str, judged: list[Judged], zero: list[Judged] | None) -> dict[str, Any]:
        found = bootstrap(
            self._statistics(name, judged),
            resamples=self.spec.resamples,
            confidence=self.spec.confidence,
            seed=self.seed,
        )
        entry = {"name": name, "value": found.value, "low": found.low, "high": found.high, "n": found.n}
        if zero is None:
            return {**entry, "difference": None}
        both = [(a, b) for a, b in zip(zero, judged, strict=True) if (name in a.scores) == (name in b.scores)]
        before, after = (self._statistics(name, [pair[side] for pair in both]) for side in (0, 1))
        return {**entry, "difference": paired(before, after, self.spec, self.seed)}

    def _statistics(self, name: str, judged: Sequence[Judged]) -> RowStatistics:
        found = metric_rows(name, judged)
        if found is None:
            raise InputError(f"{name} says nothing of these rows", where="evaluate.metrics", fix="name another metric")
        return found


def paired(before: RowStatistics, after: RowStatistics, spec: EvaluateSpec, seed: int) -> dict[str, Any]:
    """The difference of two on the same rows, with its interval and p-value."""
    found = paired_bootstrap(before, after, resamples=spec.resamples, confidence=spec.confidence, seed=seed)
    p, test = paired_test(before, after, resamples=spec.resamples, seed=seed)
    return {"difference": found.difference, "low": found.low, "high": found.high, "n": found.n, "p": p, "test": test}


def decided(entries: Sequence[dict[str, Any]], name: str, target: float | None) -> dict[str, Any]:
    """The lowest rung whose value reaches the target, the lowest whose whole interval does, and both in a sentence."""
    if not entries:
        return {"by_value": None, "by_interval": None, "sentence": "No rung was measured."}
    sign = 1 if better_way(name) == "higher" else -1
    best = max(entries, key=lambda entry: sign * entry["value"])
    if target is None:
        sentence = f"No target was given; the best is {_told(best, name)}."
        return {"by_value": None, "by_interval": None, "sentence": sentence}
    bound = "low" if sign > 0 else "high"
    reached = [entry for entry in entries if sign * entry["value"] >= sign * target]
    sure = [entry for entry in entries if entry[bound] is not None and sign * entry[bound] >= sign * target]
    aim = f"{name} {'≥' if sign > 0 else '≤'} {target:g}"
    if not reached:
        sentence = f"No rung reaches {aim}; the best is {_told(best, name)}."
    elif sure and sure[0] is reached[0]:
        sentence = f"{_told(reached[0], name)} is the lowest rung that reaches {aim}, and so does its whole interval."
    else:
        other = f"{sure[0]['name']} is the lowest for which it does" if sure else "for none does it"
        sentence = (
            f"{_told(reached[0], name)} is the lowest rung that reaches {aim} by its value; its interval does not lie "
            f"beyond the target as a whole, {other}."
        )
    return {
        "by_value": reached[0]["name"] if reached else None,
        "by_interval": sure[0]["name"] if sure else None,
        "sentence": sentence,
    }


def _told(entry: dict[str, Any], name: str) -> str:
    span = "" if entry["low"] is None else f", interval {entry['low']:.3g} to {entry['high']:.3g}"
    return f"{entry['name']} ({name} {entry['value']:.3g}{span})"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
