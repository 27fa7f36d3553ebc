"""Task score against forgetting over the checkpoints of a run."""

from __future__ import annotations

from typing import Any

from tunesmith.base import InputError, Progress, silent
from tunesmith.evaluation.answers import Evaluation, Judged
from tunesmith.evaluation.compare import better_way, compare_forgetting, compare_metrics
from tunesmith.models.load import load_model
from tunesmith.pipeline.locating import run_recipe
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.proof import Proof
from tunesmith.pipeline.resuming import resumed_plan
from tunesmith.plan.hardware import DTYPES
from tunesmith.run import BASE_EVALUATION, Run
from tunesmith.train.checkpoint import Checkpoints

CURVE, CURVE_PAGE = "forgetting.json", "forgetting.html"


def forgetting_curve(run: Run, progress: Progress = silent) -> dict[str, Any]:
    """The deciding metric on the test rows and the perplexity on general text of every checkpoint that is kept.

    Returns:
        ``metric`` and ``points``: the base as step 0, and each checkpoint with ``score`` and ``change``, the relative
        change of perplexity with ``low`` and ``high``.

    Raises:
        InputError: for a run whose model judges, that measured no general text, or that kept no checkpoint.
    """
    recipe = run_recipe(run)
    if recipe.evaluate == "off" or recipe.evaluate.forgetting == "off":
        raise InputError(
            "this run measures no general text", where=run.path, fix="train it with evaluate.forgetting: auto"
        )
    checkpoints = Checkpoints(run.checkpoints, recipe.train.keep)
    steps = checkpoints.steps()
    if not steps:
        raise InputError(
            "this run keeps no checkpoint", where=run.path, fix="train it with train.checkpoint_every and train.keep"
        )
    planned = plan_job(recipe, progress)
    planned = planned.with_plan(resumed_plan(run, planned, ()))
    if planned.judges is not None or planned.plan.streamed_tokens is not None:
        raise InputError("this is for models that write, and are in memory whole", where=run.path)
    spec = recipe.evaluate.model_copy(update={"benchmarks": [], "kl_prompts": 0, "memorisation": "off"})
    proof = Proof(planned, spec)
    progress("loading the model", 0, None)
    model = load_model(
        planned.location,
        dtype=DTYPES[planned.plan.frozen_dtype],
        device=planned.hardware.device,
        revision=recipe.model.revision,
        quantized=recipe.model.quantization,
    )
    base: Evaluation = run.read(BASE_EVALUATION)
    recipe.method.adapt(model)
    measured: list[tuple[int, Evaluation]] = []
    for step in steps:
        checkpoints.load_weights(step, model, recipe.method)
        measured.append((step, proof.evaluate(model, progress)))
    return _curve(proof, base, measured, recipe.seed)


def _curve(proof: Proof, base: Evaluation, measured: list[tuple[int, Evaluation]], seed: int) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    metric = proof.planned.plan.metrics[0]
    before = [Judged(**row) for row in base["rows"]]
    for step, found in measured:
        after = [Judged(**row) for row in found["rows"]]
        entry = next(iter(compare_metrics([metric], before, after, proof.spec, seed)[0]), None)
        source = proof.general.source if proof.general else None
        changed = compare_forgetting(source, base["general"], found["general"], proof.spec, seed)
        if entry is None or changed["status"] != "measured":
            raise InputError(f"{metric} or the perplexity on general text of step {step} is not finite")
        if not points:
            points.append({"step": 0, "score": entry["base"], "change": 0.0, "low": None, "high": None})
        points.append(
            {"step": step, "score": entry["tuned"], **{key: changed[key] for key in ("change", "low", "high")}}
        )
    return {"metric": metric, "points": points, "sentence": _sentence(metric, points)}


def _sentence(metric: str, points: list[dict[str, Any]]) -> str:
    """Which checkpoint is best at the task, and which of those that forgot nothing beyond noise."""
    sign = 1 if better_way(metric) == "higher" else -1
    best = max(points, key=lambda point: sign * point["score"])
    spared = [point for point in points if point["low"] is None or point["low"] <= 0]
    told = f"{metric} is best at {_named(best)} ({best['score']:.4g}, general text {best['change']:+.1%})"
    kept = max(spared, key=lambda point: sign * point["score"])
    if kept is best:
        return f"{told}, where no forgetting is shown."
    return f"{told}; without forgetting beyond noise it is {kept['score']:.4g} at {_named(kept)}."


def _named(point: dict[str, Any]) -> str:
    return f"step {point['step']}" if point["step"] else "the base"
