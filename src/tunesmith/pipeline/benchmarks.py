"""Benchmarks of a model by any name, compared with its base where it has one."""

from __future__ import annotations

from typing import Any

from tunesmith.base import InputError, Progress, silent
from tunesmith.evaluation.benchmark_names import refuse_unknown
from tunesmith.evaluation.benchmarks import Asked, compare_benchmarks, with_intervals
from tunesmith.pipeline.ability import kept_benchmarks
from tunesmith.pipeline.loaded import Speaker, load_speaker
from tunesmith.pipeline.locating import base_of_run, locate
from tunesmith.recipe import EvaluateSpec


def benchmarks_of(target: str, asked: Asked, progress: Progress = silent) -> dict[str, Any]:
    """How a model does on benchmarks.

    Args:
        target: a model's directory, a hub id, an adapter, or a run; the last two are compared with their base.

    Returns:
        ``benchmarks``: as `evaluation.benchmarks.with_intervals`, or as `compare_benchmarks` where there is a base;
        ``notes`` and ``sources``.

    Raises:
        InputError: for a model that judges, an unknown benchmark, or items that cannot be had.
    """
    refuse_unknown(asked.names, "--benchmarks")
    location = locate(target, progress)
    if location.head is not None:
        raise InputError("this model judges and writes nothing", where=target, fix="judge it on rows: --data")
    spec = EvaluateSpec()
    tuned = load_speaker(target, progress=progress)
    found = _kept(tuned, asked, progress)
    rest = {"notes": found["notes"], "sources": found["sources"]}
    if location.recipe is None and location.adapter is None:
        entries = with_intervals(found["benchmarks"], resamples=spec.resamples, confidence=spec.confidence)
        return {"benchmarks": entries, **rest}
    base_path = location.base
    if location.run is not None and location.recipe is not None and location.adapter is None:
        base_path = base_of_run(location.run, location.recipe)
    base = _kept(load_speaker(base_path, progress=progress, like=location), asked, progress)
    how: dict[str, Any] = {"resamples": spec.resamples, "confidence": spec.confidence, "seed": 0}
    return {"benchmarks": compare_benchmarks(base["benchmarks"], found["benchmarks"], **how), **rest}


def _kept(speaker: Speaker, asked: Asked, progress: Progress) -> dict[str, Any]:
    return kept_benchmarks(speaker.model, speaker.tokenizer, asked, progress)
