"""General ability by lm-eval's benchmarks: what they are, how a model does, and how that changed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.evaluation.benchmark_data import HUB, Items
from tunesmith.evaluation.benchmark_names import require_harness
from tunesmith.metrics import RowStatistics, bootstrap, mean_rows, paired_bootstrap

DECIDING = ("acc_norm", "acc", "exact_match", "em", "f1", "word_perplexity")
"""Which of a task's metrics stands for it: the first of these that it has."""

SKILLS = {
    "hellaswag": "everyday situations",
    "piqa": "everyday physics",
    "winogrande": "what words refer to",
    "mmlu": "knowledge by subject",
    "arc": "school science",
    "sciq": "school science",
    "openbookqa": "school science",
    "boolq": "reading",
    "commonsense_qa": "common sense",
    "copa": "cause and effect",
    "rte": "inference",
    "gsm8k": "arithmetic in words",
    "triviaqa": "trivia",
    "nq_open": "trivia",
}
"""What a benchmark asks for; by the beginning of its name."""


@dataclass(frozen=True)
class Asked:
    """Which benchmarks, and how.

    Attributes:
        names: of tasks, groups and tags, as lm-eval has them.
        limit: at most this many items of each task (of a group: of each of its tasks), the first ones; None for all.
        shots: worked examples before each item; None for what each task says itself.
        data: a directory with items, `hub`, or None for what Tunesmith fetches.
    """

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    data: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "limit": self.limit, "shots": self.shots, "data": self.data}


def skill_of(name: str) -> str:
    """What a benchmark asks for; its own name where that is not known."""
    return next((skill for start, skill in SKILLS.items() if name.startswith(start)), name)


def run_benchmarks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Asked, progress: Progress
) -> dict[str, Any]:
    """How a model does.

    Returns:
        ``benchmarks``: for each name ``metric``, ``value`` as lm-eval aggregates it, ``n``, ``shots``, ``better``,
        ``skill``, and by task the ``scores`` of the items (None where the metric is no mean over items); ``notes``; and
        ``sources``, where items came from.

    Raises:
        InputError: for an unknown name, or items that cannot be had.
    """
    require_harness()
    with _quiet(progress) as shown:
        from lm_eval.evaluator import evaluate

        from tunesmith.evaluation.benchmark_model import SharedPrefixLM
        from tunesmith.evaluation.benchmark_tasks import load_tasks

        shown("reading the benchmarks", 0, None)
        items = Items(asked.data, shown)
        loaded, notes = load_tasks(asked.names, items, asked.shots)
        found = evaluate(
            lm=SharedPrefixLM(model, tokenizer, shown),
            task_dict=loaded,
            limit=asked.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return summary(found, asked, notes, items.sources)


def summary(found: Any, asked: Asked, notes: Sequence[str], sources: dict[str, str]) -> dict[str, Any]:
    """What `run_benchmarks` returns, from what lm-eval's `evaluate` does, whatever model it asked."""
    entries = []
    for name in asked.names:
        leaves = _leaves(name, found)
        if not leaves:  # a tag, which lm-eval does not aggregate
            entries += [_entry(leaf, [leaf], found) for leaf in _tagged(name, found)]
        else:
            entries.append(_entry(name, leaves, found))
    return {"benchmarks": entries, "notes": list(notes), "sources": sources}


def _leaves(name: str, found: Any) -> list[str]:
    """The tasks of a group, at any depth; of a task itself."""
    members = found["group_subtasks"].get(name)
    if members is None:
        return [name] if name in found["samples"] else []
    return [leaf for member in members for leaf in _leaves(member, found)]


def _tagged(name: str, found: Any) -> list[str]:
    return [
        task for task, config in found["configs"].items() if name in (config.get("tag") or []) or name in task
    ] or list(found["samples"])


def _entry(name: str, leaves: list[str], found: Any) -> dict[str, Any]:
    results = found["results"][name]
    keys = [key for key in results if "," in key and "_stderr" not in key and isinstance(results[key], int | float)]
    if not keys:
        raise InputError(f"lm-eval gives {name} no score of its own", fix="name its tasks instead")
    key = min(keys, key=lambda key: DECIDING.index(one) if (one := key.partition(",")[0]) in DECIDING else 99)
    metric, _, chosen = key.partition(",")
    scores: dict[str, list[float]] | None = {}
    for leaf in leaves:
        own = [sample[metric] for sample in found["samples"][leaf] if sample["filter"] == chosen and metric in sample]
        mean = found["results"][leaf].get(key)
        plain = all(isinstance(score, int | float) for score in own) and own
        if not plain or not isinstance(mean, int | float) or abs(sum(own) / len(own) - mean) > 1e-6:
            scores = None
            break
        scores[leaf] = [float(score) for score in own]
    higher = found["higher_is_better"].get(name) or {}
    return {
        "name": name,
        "skill": skill_of(name),
        "metric": metric,
        "value": float(results[key]),
        "n": sum(int(found["n-samples"][leaf]["effective"]) for leaf in leaves),
        "shots": found["n-shot"].get(name, 0),
        "better": "lower" if higher.get(metric) is False else "higher",
        "scores": scores,
        "others": {other: float(results[other]) for other in keys if other != key},
    }


def _rows(entry: dict[str, Any]) -> RowStatistics | None:
    """Statistics over all items of a benchmark; None where its value is not their mean."""
    if entry["scores"] is None:
        return None
    flat = [score for scores in entry["scores"].values() for score in scores]
    return mean_rows(flat) if abs(sum(flat) / len(flat) - entry["value"]) < 1e-6 else None


def with_intervals(entries: Sequence[dict[str, Any]], *, resamples: int, confidence: float) -> list[dict[str, Any]]:
    """One model's benchmarks without the items, with ``low`` and ``high`` where an interval can be stated."""
    shown = []
    for entry in entries:
        rows = _rows(entry)
        estimate = None if rows is None else bootstrap(rows, resamples=resamples, confidence=confidence, seed=0)
        low, high = (None, None) if estimate is None else (estimate.low, estimate.high)
        shown.append({**{key: value for key, value in entry.items() if key != "scores"}, "low": low, "high": high})
    return shown


def compare_benchmarks(
    base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]], *, resamples: int, confidence: float, seed: int
) -> list[dict[str, Any]]:
    """Before and after on the same items: as the metrics of a report, with ``skill``, ``metric`` and ``shots``."""
    compared = []
    for before, after in zip(base, tuned, strict=True):
        rows = _rows(before), _rows(after)
        low = high = None
        if rows[0] is not None and rows[1] is not None and len(rows[0]) == len(rows[1]):
            interval = paired_bootstrap(rows[0], rows[1], resamples=resamples, confidence=confidence, seed=seed)
            low, high = interval.low, interval.high
        compared.append(
            {
                **{key: after[key] for key in ("name", "skill", "metric", "shots", "n", "better")},
                "base": before["value"],
                "tuned": after["value"],
                "difference": after["value"] - before["value"],
                "low": low,
                "high": high,
            }
        )
    return compared


def item_texts(asked: Asked, progress: Progress) -> dict[str, list[str]]:
    """The questions of each benchmark with their right answers, as text, to look for in training data."""
    require_harness()
    texts: dict[str, list[str]] = {}
    with _quiet(progress) as shown:
        from tunesmith.evaluation.benchmark_tasks import load_tasks

        for name in asked.names:
            loaded, _ = load_tasks([name], Items(asked.data, shown), asked.shots)
            texts[name] = [
                _text_of(task, doc)
                for task in loaded["tasks"].values()
                for _, doc in task.doc_iterator(limit=asked.limit)
            ]
    return texts


def _text_of(task: Any, doc: Any) -> str:
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
    if isinstance(question, int) and choices:  # the answer is part of the question, and its end is the target
        return f"{choices[question]} {target}"
    if choices and isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    return f"{question} {target}"


@contextmanager
def _quiet(progress: Progress) -> Iterator[Progress]:
    """Silences the bars and the log of lm-eval and datasets, and yields a progress that is still seen."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars, level = is_progress_bar_enabled(), logging.getLogger("lm_eval").level
    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seen = sys.stderr

    def shown(label: str, done: int, total: int | None) -> None:
        with redirect_stderr(seen):
            progress(label, done, total)

    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield shown
    finally:
        logging.getLogger("lm_eval").setLevel(level)
        if bars:
            enable_progress_bar()


__all__ = ["HUB", "Asked", "compare_benchmarks", "item_texts", "run_benchmarks", "summary", "with_intervals"]
