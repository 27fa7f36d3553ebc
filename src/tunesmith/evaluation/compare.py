"""Base against tuned: metrics with paired intervals, forgetting, gates, and the verdict in one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Judged, implicit_rewards
from tunesmith.metrics import (
    CALIBRATION_ERROR,
    COMPARED,
    METRICS,
    OF_DOCUMENTS,
    PREFERENCE_ACCURACY,
    REWARD,
    REWARD_ACCURACY,
    RowStatistics,
    bits_per_byte_rows,
    calibration_rows,
    confidence_rows,
    holm,
    mean_rows,
    metric,
    paired_bootstrap,
    paired_test,
    perplexity_rows,
)
from tunesmith.recipe import EvaluateSpec

PERPLEXITY, BITS_PER_BYTE = OF_DOCUMENTS
LIKELIHOODS = {**dict.fromkeys(OF_DOCUMENTS, "lower"), **COMPARED}
"""Metrics of what the model finds likely, not of what it writes, and which way they improve."""
NOTABLE_FORGETTING = 0.10
Verdict = Literal["ship", "dont_ship", "no_difference"]
Shown = Literal["better", "worse", "no_difference", "no_interval"]


def choose_metrics(
    asked: Sequence[str] | str, references: Sequence[str], own: Collection[str] = ()
) -> tuple[list[str], str]:
    """The metrics of an evaluation, the deciding one first, and why.

    Args:
        asked: names from the recipe, or `auto`.
        references: reference answers of the rows; empty for raw text.
        own: names of the recipe's own metrics.

    Raises:
        InputError: for an unknown name.
    """
    if not isinstance(asked, str):
        names = list(dict.fromkeys(asked))
        for name in names:
            if name not in LIKELIHOODS and name not in own:
                _known(name)
        return (names if PERPLEXITY in names else [*names, PERPLEXITY]), "as the recipe says"
    if not references:
        return [PERPLEXITY], "the rows are raw text"
    counts = Counter(text.strip().casefold() for text in references)
    words = sum(len(text.split()) for text in references) / len(references)
    repeated = sum(count for count in counts.values() if count > 1)
    if words <= 4 and (len(counts) <= 2 or repeated > len(references) / 2):
        return ["accuracy", PERPLEXITY], f"the answers are {len(counts)} labels"
    if words <= 4:
        return ["exact_match", "f1", PERPLEXITY], f"the answers are short ({words:.0f} words on average)"
    if words <= 25 and _look_formal(references):
        return ["exact_match", "rougeL", "f1", PERPLEXITY], "the answers look like code, queries or records"
    return ["rougeL", "rouge1", "rouge2", "chrf", PERPLEXITY], f"the answers are text of {words:.0f} words on average"


def _known(name: str) -> None:
    try:
        metric(name)
    except InputError as error:
        raise InputError(error.what, where="evaluate.metrics", fix=f"{error.fix}, {', '.join(LIKELIHOODS)}") from error


def _look_formal(references: Sequence[str]) -> bool:
    """Whether most answers are more symbols and capitals than prose, as queries, JSON and code are."""
    formal = 0
    for text in references:
        upper_words = sum(word.isupper() and len(word) > 1 for word in text.split())
        symbols = sum(not (c.isalnum() or c.isspace() or c in ".,'’-?!\"") for c in text)
        formal += upper_words >= 2 or symbols > 0.05 * len(text)
    return formal > 0.6 * len(references)


def metric_rows(name: str, judged: Sequence[Judged]) -> RowStatistics | None:
    """Statistics of one metric over the rows that have what it needs; None when there are none."""
    if name == PERPLEXITY:
        scored = [row for row in judged if row.nll is not None and row.targets]
        return perplexity_rows([row.nll or 0.0 for row in scored], [row.targets for row in scored]) if scored else None
    if name == REWARD:
        rewards = [row.reward for row in judged if row.reward is not None]
        return mean_rows(rewards) if rewards else None
    if name == BITS_PER_BYTE:
        texts = [row for row in judged if row.nll is not None and row.bytes]
        counts = [row.bytes or 0 for row in texts]
        return bits_per_byte_rows([row.nll or 0.0 for row in texts], counts) if texts else None
    if name == CALIBRATION_ERROR and any(row.confidence is not None for row in judged):
        sure = [row for row in judged if row.confidence is not None]
        return confidence_rows([row.confidence or 0.0 for row in sure], [_is_right(row) for row in sure])
    if name in COMPARED:
        found = [row.gained if name == REWARD_ACCURACY else row.margin for row in judged]
        margins = [margin for margin in found if margin is not None]
        if name in (PREFERENCE_ACCURACY, REWARD_ACCURACY):
            margins = [float(margin > 0) + 0.5 * (margin == 0) for margin in margins]
        if name == CALIBRATION_ERROR:
            return calibration_rows(margins) if margins else None
        return mean_rows(margins) if margins else None
    if any(name in row.scores for row in judged):
        return mean_rows([row.scores[name] for row in judged if name in row.scores])
    answered = [row for row in judged if row.answer is not None]
    if not answered or name not in METRICS:
        return None
    return metric(name).rows([row.answer or "" for row in answered], [row.references for row in answered])


def _is_right(row: Judged) -> bool:
    """As `accuracy` has it."""
    said = (row.answer or "").strip().casefold()
    return said in {reference.strip().casefold() for reference in row.references}


def better_way(name: str) -> str:
    """`higher` or `lower`."""
    return LIKELIHOODS.get(name) or (METRICS[name].better if name in METRICS else "higher")


def compare_metrics(
    names: Sequence[str], base: Sequence[Judged], tuned: Sequence[Judged], spec: EvaluateSpec, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry per metric for the report, and a warning for each that could not be computed."""
    entries, warnings = [], []
    for name in names:
        both, dead = comparable(name, base, tuned)
        base_rows = metric_rows(name, [b for b, _ in both])
        tuned_rows = metric_rows(name, [t for _, t in both])
        if dead:
            warnings.append(f"{name} could not be computed: the tuned model's likelihood of {dead} rows is not finite")
            continue
        if base_rows is None or tuned_rows is None:
            warnings.append(f"{name} could not be computed: no row has what it needs")
            continue
        if len(both) < len(base):
            lost = len(base) - len(both)
            warnings.append(f"{name} leaves out {lost} of {len(base)} rows: the base's likelihood is not finite")
        interval = paired_bootstrap(
            base_rows, tuned_rows, resamples=spec.resamples, confidence=spec.confidence, seed=seed
        )
        p, test = paired_test(base_rows, tuned_rows, resamples=spec.resamples, seed=seed)
        entries.append(
            {
                "name": name,
                "base": interval.base,
                "tuned": interval.tuned,
                "difference": interval.difference,
                "low": interval.low,
                "high": interval.high,
                "better": better_way(name),
                "n": interval.n,
                "primary": name == names[0],
                "p": p,
                "test": test,
            }
        )
    return with_findings(entries, spec.confidence), warnings


def with_findings(entries: Sequence[dict[str, Any]], confidence: float) -> list[dict[str, Any]]:
    """Entries with `p_corrected` and what each has `shown`: `better`, `worse`, `no_difference`, or `no_interval`.

    The deciding metric was named before anything was measured, and is tested by itself; the others are corrected for
    being several (Holm 1979). A difference is shown where the interval excludes zero and the test agrees.
    """
    others = [entry for entry in entries if not entry["primary"]]
    corrected = dict(zip([entry["name"] for entry in others], holm([entry["p"] for entry in others]), strict=True))
    found = []
    for entry in entries:
        p = corrected.get(entry["name"], entry["p"])
        found.append({**entry, "p_corrected": p, "shown": shown_of({**entry, "p_corrected": p}, 1 - confidence)})
    return found


def shown_of(entry: dict[str, Any], alpha: float) -> Shown:
    """What an entry shows: a difference where the interval excludes zero and the corrected p-value is at most alpha."""
    low, high = entry["low"], entry["high"]
    if low is None or high is None:
        return "no_interval"
    p = entry.get("p_corrected")
    if low <= 0 <= high or (p is not None and p > alpha):
        return "no_difference"
    return "better" if (low > 0) == (entry["better"] == "higher") else "worse"


def comparable(name: str, base: Sequence[Judged], tuned: Sequence[Judged]) -> tuple[list[tuple[Judged, Judged]], int]:
    """The rows on which both can be measured, and on how many only the tuned model fails."""
    pairs = list(zip(base, tuned, strict=True))
    if name == REWARD_ACCURACY:
        rewards = [implicit_rewards(b, t) for b, t in pairs]
        return [
            (replace(b, gained=0.0), replace(t, gained=found[0] - found[1]))
            for (b, t), found in zip(pairs, rewards, strict=True)
            if found is not None
        ], sum(t.nll is None or t.other_nll is None for b, t in pairs if b.nll is not None and b.other_nll is not None)
    if name == CALIBRATION_ERROR and any(b.confidence is not None for b, _ in pairs):
        return [(b, t) for b, t in pairs if None not in (b.confidence, t.confidence)], 0
    if name in COMPARED:
        return [(b, t) for b, t in pairs if None not in (b.margin, t.margin)], sum(
            t.margin is None for b, t in pairs if b.margin is not None
        )
    if name not in OF_DOCUMENTS:
        return pairs, 0
    return [(b, t) for b, t in pairs if None not in (b.nll, t.nll)], sum(
        t.nll is None for b, t in pairs if b.nll is not None
    )


def compare_forgetting(
    source: str | None, base: dict[str, Any] | None, tuned: dict[str, Any] | None, spec: EvaluateSpec, seed: int
) -> dict[str, Any]:
    """Perplexity on general text before and after; `change` is relative."""
    if source is None:
        return {"status": "off", "reason": "evaluate.forgetting is off"}
    if not base or not tuned:
        return {"status": "could_not_run", "source": source, "reason": "the passages could not be scored"}
    before = perplexity_rows(base["nlls"], base["targets"])
    try:
        after = perplexity_rows(tuned["nlls"], tuned["targets"])
        interval = paired_bootstrap(before, after, resamples=spec.resamples, confidence=spec.confidence, seed=seed)
    except (ValueError, TypeError):
        return {"status": "could_not_run", "source": source, "reason": "the likelihood of the text is not finite"}

    def relative(value: float | None) -> float | None:
        return None if value is None else value / interval.base

    return {
        "status": "measured",
        "source": source,
        "base": interval.base,
        "tuned": interval.tuned,
        "change": relative(interval.difference),
        "low": relative(interval.low),
        "high": relative(interval.high),
        "n": interval.n,
    }


@dataclass(frozen=True)
class Judgement:
    """What a comparison comes to."""

    verdict: Verdict
    sentence: str
    gate: list[dict[str, Any]]


def gain(entry: dict[str, Any]) -> tuple[float, float | None]:
    """How much better the tuned model is, and the lower bound of that."""
    sign = 1 if entry["better"] == "higher" else -1
    bound = entry["low"] if sign > 0 else entry["high"]
    return sign * entry["difference"], None if bound is None else sign * bound


def judgement(
    metrics: Sequence[dict[str, Any]],
    forgetting: dict[str, Any],
    gate: dict[str, float],
    beside: Sequence[dict[str, Any]] = (),
    said: Sequence[str] = (),
) -> Judgement:
    """The verdict: by the gate when there is one, else by the deciding metric's interval.

    Args:
        beside: requirements of the gate that have been checked elsewhere, by their names.
        said: clauses about what else was looked at.
    """
    done = {check["name"]: check for check in beside}
    primary = metrics[0] if metrics and metrics[0].get("primary", True) else None
    checks = [done.get(name) or _check(name, required, metrics, forgetting) for name, required in gate.items()]
    verdict: Verdict
    if checks:
        verdict = "ship" if all(check["passed"] is True for check in checks) else "dont_ship"
    elif primary is None:
        verdict = "no_difference"
    else:
        verdict = _by_interval(primary)
    unmeasured = "the deciding metric could not be measured" if metrics else "nothing was measured"
    return Judgement(verdict, _sentence(verdict, primary or unmeasured, forgetting, checks, said), checks)


def _by_interval(entry: dict[str, Any]) -> Verdict:
    shown = entry.get("shown") or shown_of(entry, 0.0)
    return "ship" if shown == "better" else "dont_ship" if shown == "worse" else "no_difference"


def _check(name: str, required: float, metrics: Sequence[dict[str, Any]], forgetting: dict[str, Any]) -> dict[str, Any]:
    check: dict[str, Any] = {"name": name, "required": required, "measured": None, "passed": None, "reason": ""}
    if name == "forgetting":
        change, low = forgetting.get("change"), forgetting.get("low")
        if forgetting.get("status") != "measured" or change is None:
            return {**check, "reason": f"could not be measured: {forgetting.get('reason', '')}"}
        return {
            **check,
            "measured": change,
            "passed": change <= required or (low is not None and low <= 0),
            "reason": "rise of perplexity on general text, at most what is required"
            + (
                ", which the passages do not tell from chance"
                if low is not None and low <= 0 < required < change
                else ""
            ),
        }
    entry = next((item for item in metrics if item["name"] == name), None)
    if entry is None:
        return {**check, "reason": "this metric could not be measured"}
    better, bound = gain(entry)
    proven = required <= 0 or (bound is not None and bound > 0 and entry.get("shown", "better") == "better")
    reason = "gain over the base" if proven else "the gain is not distinguishable from zero"
    return {**check, "measured": better, "passed": better >= required and proven, "reason": reason}


def _sentence(
    verdict: Verdict,
    primary: dict[str, Any] | str,
    forgetting: dict[str, Any],
    checks: Sequence[dict[str, Any]],
    said: Sequence[str],
) -> str:
    opening = {"ship": "Ship it", "dont_ship": "Don't ship it", "no_difference": "No difference shown"}[verdict]
    parts = []
    if isinstance(primary, str):
        parts.append(primary)
    else:
        figures = f"{primary['name']} went from {_figure(primary['base'])} to {_figure(primary['tuned'])}"
        if primary["low"] is not None:
            figures += (
                f" (difference {primary['difference']:+.3g}, interval {primary['low']:+.3g} to {primary['high']:+.3g}"
            )
            figures += f", {primary['n']} held-out rows)"
        parts.append(figures)
    failed = [check for check in checks if check["passed"] is not True]
    parts += [
        f"the gate {check['name']} asked for {check['required']:+.3g}"
        " and " + ("could not be checked" if check["passed"] is None else f"measured {check['measured']:+.3g}")
        for check in failed
    ]
    if forgetting.get("status") == "measured" and forgetting.get("change") is not None:
        change = forgetting["change"]
        warning = ", which is a lot" if change > NOTABLE_FORGETTING else ""
        parts.append(f"perplexity on general text changed by {round(change, 3) + 0.0:+.1%}{warning}")
    elif forgetting.get("status") == "could_not_run":
        parts.append("forgetting could not be measured")
    return f"{opening}: {'; '.join([*parts, *said])}."


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def best_and_worst(
    name: str, base: Sequence[Judged], tuned: Sequence[Judged], count: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows where the tuned model gained most, and those where it lost most, by the deciding metric."""
    written = any(row.answer is not None for row in tuned)
    scored_name = name if written or name in COMPARED else PERPLEXITY
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if scored_name in LIKELIHOODS or t.answer is not None]
    if scored_name in LIKELIHOODS:
        pairs = [(b, t) for b, t in comparable(scored_name, base, tuned)[0] if t.targets]
    before, after = metric_rows(scored_name, [b for b, _ in pairs]), metric_rows(scored_name, [t for _, t in pairs])
    if before is None or after is None:
        return {"best": [], "worst": []}
    sign = -1 if better_way(scored_name) == "lower" else 1
    rows = list(zip(pairs, before.per_row().tolist(), after.per_row().tolist(), strict=True))
    rows.sort(key=lambda row: (sign * (row[2] - row[1]), sign * row[2]), reverse=True)
    shown = [
        {
            "prompt": t.prompt,
            "references": t.references,
            "base": b.answer,
            "tuned": t.answer,
            "score_base": score_base,
            "score_tuned": score_tuned,
            "source": t.source,
        }
        for (b, t), score_base, score_tuned in rows
    ]
    half = min(count, max(1, len(shown) // 2))
    return {"best": shown[:half], "worst": shown[-half:][::-1]} if count else {"best": [], "worst": []}
