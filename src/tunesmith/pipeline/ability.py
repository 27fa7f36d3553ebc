"""General ability before and after a job: benchmarks, and the divergence from the base on general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.data.cache import cached
from tunesmith.data.render import Renderer, tokenizer_sha256
from tunesmith.evaluation.benchmark_data import HUB, content_of
from tunesmith.evaluation.benchmark_names import require_harness
from tunesmith.evaluation.benchmarks import Asked, compare_benchmarks, run_benchmarks
from tunesmith.evaluation.damage import BENCHMARKS, KL, benchmark_check, divergence_check, said_of_benchmarks
from tunesmith.evaluation.divergence import base_answers, compare_divergence, divergences_from
from tunesmith.files import read_json, write_json
from tunesmith.pipeline.by_target import weights_sha256
from tunesmith.pipeline.planning import Planned
from tunesmith.recipe import EvaluateSpec

RESULTS = "benchmarks.json"
FORM = 1
"""Raised when what is stored of a model's benchmarks changes."""

Measured = dict[str, Any]
"""`benchmarks` as `run_benchmarks` returns them, and `kl`: of the base its answers, of the tuned model a number each;
None for what was not asked for."""


def asked_benchmarks(spec: EvaluateSpec) -> Asked | None:
    """The benchmarks of a recipe; None without any."""
    if not spec.benchmarks:
        return None
    names = tuple(dict.fromkeys(spec.benchmarks))
    return Asked(names, spec.benchmark_limit, spec.benchmark_shots, spec.benchmark_data)


def kept_benchmarks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Asked, progress: Progress
) -> dict[str, Any]:
    """`run_benchmarks`, done once for the same weights, tokenizer, items and version of lm-eval.

    Raises:
        InputError: as `run_benchmarks`, or when the results cannot be kept on disk.
    """
    require_harness()
    loaded: Any = model
    items = None if asked.data in (None, HUB) else content_of(Path(asked.data).expanduser())
    made_from = {
        "benchmarks": {**asked.as_json(), "items": items},
        "form": FORM,
        "harness": version("lm-eval"),
        "weights": weights_sha256(model, loaded.config),
        "dtype": str(next(model.parameters()).dtype),
        "device": next(model.parameters()).device.type,
        "tokenizer": tokenizer_sha256(tokenizer),
        "torch": torch.__version__,
    }

    def measure(directory: Path) -> None:
        write_json(directory / RESULTS, run_benchmarks(model, tokenizer, asked, progress))

    return read_json(cached(made_from, measure) / RESULTS)


class Ability:
    """What of a job's general ability is measured.

    Raises:
        InputError: for settings that a model that judges cannot have, or without lm-eval.
    """

    def __init__(self, planned: Planned, spec: EvaluateSpec) -> None:
        self.planned, self.spec = planned, spec
        self.asked = asked_benchmarks(spec)
        self.prompts = spec.kl_prompts
        if self.asked is not None:
            require_harness()
        if self.prompts and not isinstance(planned.renderer, Renderer):
            raise InputError(
                "this job renders no conversations, in which a model could answer general prompts",
                where="evaluate.kl_prompts",
                fix="remove it",
            )

    def of_base(self, model: nn.Module, progress: Progress) -> Measured:
        """Before the model is adapted."""
        benchmarks = None if self.asked is None else kept_benchmarks(model, self._tokenizer, self.asked, progress)
        answers = None
        if self.prompts:
            renderer, prepared = self.planned.renderer, self.planned.prepared
            assert isinstance(renderer, Renderer) and prepared is not None
            stop_ids = set(renderer.stop_ids or prepared.stop_ids)
            answers = base_answers(model, renderer, self.prompts, stop_ids, self.planned.plan.packing, progress)
        return {"benchmarks": benchmarks, "kl": answers}

    def of_tuned(self, model: nn.Module, base: Measured, progress: Progress) -> Measured:
        """After training; ``base`` is what `of_base` found."""
        benchmarks = None if self.asked is None else run_benchmarks(model, self._tokenizer, self.asked, progress)
        found = None
        if self.prompts:
            progress("comparing with the base on general prompts", 0, None)
            found = divergences_from(model, base["kl"] or [], self.planned.plan.packing)
            found = None if any(value - value != 0.0 for value in found) else found  # JSON has no NaN
        return {"benchmarks": benchmarks, "kl": found}

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.planned.tokenizer is not None
        return self.planned.tokenizer


def compare_ability(base: Measured, tuned: Measured, spec: EvaluateSpec, seed: int) -> dict[str, Any]:
    """The part of a report about general ability: `benchmarks`, with `benchmark_notes`, and `divergence`."""
    how: dict[str, Any] = {"resamples": spec.resamples, "confidence": spec.confidence, "seed": seed}
    before, after = base.get("benchmarks"), tuned.get("benchmarks")
    benchmarks, notes = [], list[str]()
    if before and after:
        benchmarks = compare_benchmarks(before["benchmarks"], after["benchmarks"], **how)
        notes = list(after["notes"])
    divergence: dict[str, Any] = {"status": "off", "reason": "evaluate.kl_prompts is 0"}
    if spec.kl_prompts:
        divergence = compare_divergence(tuned.get("kl") or [], **how)
    return {"benchmarks": benchmarks, "benchmark_notes": notes, "divergence": divergence}


def gate_checks(gate: dict[str, float], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The gate's requirements about general ability, as `compare_ability` found it."""
    checks = []
    if BENCHMARKS in gate:
        checks.append(benchmark_check(gate[BENCHMARKS], found["benchmarks"]))
    if KL in gate:
        checks.append(divergence_check(gate[KL], found["divergence"]))
    return checks


def said_of(found: dict[str, Any]) -> Sequence[str]:
    """What the verdict says of general ability."""
    said = said_of_benchmarks(found["benchmarks"])
    divergence = found["divergence"]
    if divergence["status"] == "measured":
        said.append(f"KL from the base on general prompts is {divergence['value']:.3g} nats a token")
    return said
