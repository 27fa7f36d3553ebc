"""The whole job: plan, load, judge the base, adapt, train, judge the result, report."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.base import InputError, TrainingError, TunesmithError
from tunesmith.evaluation.answers import Judging, judge, mean_nll
from tunesmith.evaluation.compare import metric_rows
from tunesmith.files import committed_directory
from tunesmith.models.embeddings import untrained_tokens
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.load import Progress as ShowProgress
from tunesmith.models.load import load_model, silent
from tunesmith.pipeline.environment import describe_environment
from tunesmith.pipeline.planning import Planned, plan_job
from tunesmith.pipeline.proof import Proof, stored_evaluation, write_report
from tunesmith.pipeline.sinks import check_sinks, open_sinks
from tunesmith.pipeline.stopping import Stopping
from tunesmith.pipeline.usage import PeakMemory, Stopwatch
from tunesmith.plan.hardware import DTYPES
from tunesmith.recipe import Plan, Recipe, Resolved
from tunesmith.recipe_file import parse_yaml, recipe_yaml
from tunesmith.run import BASE_EVALUATION, DATA, ENVIRONMENT, PLAN, RECIPE, REPORT, TUNED_EVALUATION, Run
from tunesmith.train.batches import StepBatches
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.health import Health, refuse_dead_weights
from tunesmith.train.loop import Job, Progress, train
from tunesmith.train.optim import build_optimizer
from tunesmith.train.parallel import is_main, join_processes, leave_processes, wait_for_all
from tunesmith.train.precision import Precision

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Watcher:
    """Who watches a job: progress of long waits, the plan before it starts, and events as they are recorded."""

    progress: ShowProgress = silent
    event: Emit = lambda event: None
    plan: Callable[[Plan], None] = lambda plan: None


def finetune(recipe: Recipe, *, resume: bool = False, watcher: Watcher | None = None) -> Run:
    """Does the whole job and returns its run.

    Args:
        recipe: what is asked; `read_recipe` makes one from a file.
        resume: go on with the run that stands in `recipe.output`, from its last checkpoint and with its plan.
        watcher: receives progress and events.

    Raises:
        InputError: the recipe, data or model is wrong; nothing is left behind.
        TrainingError: the run diverged or collapsed; its last good checkpoint is kept.
        Interrupted: after Ctrl-C or SIGTERM; the run can be resumed.
    """
    watcher = watcher or Watcher()
    # A recipe that was made in Python has no file whose name its run could take.
    recipe = recipe.model_copy(update={"output": recipe.output.replace("{name}", "run")})
    path = Path(recipe.output)
    run = Run.open(path) if resume else None
    if run is None:
        Run.refuse_occupied(path)
    else:
        _refuse_another_recipe(run, recipe)
        if run.report is not None:
            return run
    check_sinks(list(recipe.train.log))
    planned = plan_job(recipe, watcher.progress)
    if run is not None:
        planned = planned.with_plan(_stored_plan(run, planned))
    join_processes(planned.hardware.device)
    try:
        return _execute(planned, run, watcher)
    finally:
        leave_processes()


def _execute(planned: Planned, existing: Run | None, watcher: Watcher) -> Run:
    recipe = planned.recipe
    with Stopping() as stopping:
        watcher.progress("loading the model", 0, None)
        model = load_model(
            planned.location,
            dtype=DTYPES[planned.plan.frozen_dtype],
            device=planned.hardware.device,
            revision=recipe.model.revision,
            quantize=recipe.model.quantize,
        )
        planned = planned.with_plan(_with_verified_packing(planned, model))
        proof = None if recipe.evaluate == "off" else Proof(planned, recipe.evaluate)
        run = _opened(planned, existing)
        watcher.plan(planned.plan)
        if not is_main():
            return _work(_Work(planned, run, model, None, watcher, stopping))
        with run.locked():
            return _work(_Work(planned, run, model, proof, watcher, stopping))


@dataclass(frozen=True)
class _Work:
    """One job under way."""

    planned: Planned
    run: Run
    model: PreTrainedModel
    proof: Proof | None
    watcher: Watcher
    stopping: Stopping


def _work(work: _Work) -> Run:
    planned, run, model = work.planned, work.run, work.model
    recipe, progress = planned.recipe, work.watcher.progress
    sinks = [run.append_event, work.watcher.event, *open_sinks(list(recipe.train.log), run)] if is_main() else []

    def emit(event: dict[str, Any]) -> None:
        for sink in sinks:
            sink(event)

    evaluating = Stopwatch()
    if is_main():
        stored_evaluation(run, BASE_EVALUATION, work.proof, model, progress)
    base_seconds = evaluating.seconds
    wait_for_all()
    measured = _train(work, emit)
    wait_for_all()
    if not is_main():
        return run
    evaluating = Stopwatch()
    stored_evaluation(run, TUNED_EVALUATION, work.proof, model, progress)
    measured["evaluate_seconds"] = base_seconds + evaluating.seconds
    measured["seconds"] = measured["train_seconds"] + measured["evaluate_seconds"]
    write_report(run, planned, work.proof, measured, _notes(run))
    report = run.read(REPORT)
    emit({"event": "end", "verdict": report["verdict"], "sentence": report["sentence"], "report": str(run.page)})
    return run


def _train(work: _Work, emit: Emit) -> dict[str, Any]:
    """Adapts and trains the model and commits the result; returns what it took."""
    planned, run, model = work.planned, work.run, work.model
    recipe, plan = planned.recipe, planned.plan
    method = recipe.method
    _seed(recipe.seed)
    method.adapt(model)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    casts = method.kind == "full" or bool(getattr(method, "modules_to_save", [])) or plan.dtype != plan.frozen_dtype
    precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)
    optimizer = build_optimizer(model, recipe.train, plan.learning_rate)
    checkpoints = Checkpoints(run.checkpoints, recipe.train.keep)
    progress = Progress(health=Health(vocabulary=int(planned.config.get_text_config().vocab_size)))
    newest = checkpoints.newest_sound(lambda text: emit({"event": "warning", "message": text}))
    if newest is not None:
        progress = checkpoints.restore(newest, model, method, optimizer, precision)
    if is_main():
        run.forget_events_after(progress.step if newest is not None else -1)
    if newest is None:
        _warn_of_untrained_tokens(work, emit)

    def save(now: Progress, best: bool) -> None:
        if is_main():
            checkpoints.save(now, model, method, optimizer, precision)
        wait_for_all()

    job = Job(
        model, recipe.objective, optimizer, precision, recipe.train, plan, _batches(planned), save, work.stopping.asked
    )
    watch = Stopwatch()
    with PeakMemory(planned.hardware.device) as memory:
        work.stopping.graceful = True
        try:
            progress = train(job, progress, evaluate=_validation(work, emit), emit=emit)
        except TunesmithError as error:
            if is_main():
                _record_end(run, emit, error)
            raise
        finally:
            work.stopping.graceful = False
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    _take_best(work, checkpoints, progress)
    if is_main():
        _commit_result(work)
        emit(
            {
                "event": "trained",
                "step": progress.step,
                "best_step": progress.best_step,
                "best_loss": progress.best_loss,
                "stopped_early": progress.stopped_early,
                "skipped_steps": progress.health.skipped,
            }
        )
    seconds = sum(event["seconds"] for event in run.events() if event["event"] in ("step", "validation"))
    return {
        "peak_bytes": memory.peak_bytes,
        "train_seconds": max(seconds, watch.seconds),
        "tokens_per_second": progress.tokens / max(1e-9, seconds),
    }


def _warn_of_untrained_tokens(work: _Work, emit: Emit) -> None:
    """A control token that the base never saw stays noise when its embedding is frozen."""
    planned, model = work.planned, work.model
    assert planned.renderer is not None and planned.tokenizer is not None
    if any(weight.requires_grad for weight in model.get_input_embeddings().parameters()):
        return
    found = untrained_tokens(model, planned.renderer.used_controls)
    if found:
        names = ", ".join(cast(list[str], planned.tokenizer.convert_ids_to_tokens(found)))
        message = (
            f"the template writes {names}, which this model seems never to have been trained on, and the embeddings "
            "are frozen: train them with method.modules_to_save, or choose another data.template"
        )
        emit({"event": "warning", "message": message})


def _batches(planned: Planned) -> StepBatches:
    assert planned.prepared is not None
    rows, plan, train_spec = planned.prepared.train, planned.plan, planned.recipe.train
    total = plan.steps * train_spec.batch_size
    if train_spec.epochs is not None or train_spec.steps is None:
        total = min(total, max(1, round(plan.epochs * planned.prepared.order.epoch_rows)))
    return StepBatches(rows, planned.prepared.order, batch_size=train_spec.batch_size, total_rows=total, plan=plan)


def _validation(work: _Work, emit: Emit) -> Callable[[int], float | None]:
    """Validation loss and, when the recipe asks for it, generated answers, on the main process."""
    planned = work.planned
    assert planned.prepared is not None and planned.tokenizer is not None
    rows, plan, tokenizer = planned.prepared.validation, planned.plan, planned.tokenizer
    every = planned.recipe.train.generate_every
    stop_ids = frozenset(planned.prepared.stop_ids)

    def evaluate(step: int) -> float | None:
        loss = None
        if is_main() and rows:
            watch = Stopwatch()
            if plan.evaluate_every is not None and (step % plan.evaluate_every == 0 or step == plan.steps):
                loss = mean_nll(work.model, [row.example for row in rows], packed=plan.packing)
                value = loss if loss - loss == 0.0 else None
                emit({"event": "validation", "step": step, "loss": value, "seconds": watch.seconds})
            if every != "off" and step % every == 0:
                how = Judging(plan.max_new_tokens, 16, stop_ids, plan.packing)
                judged = judge(work.model, tokenizer, rows, how, silent)
                scores = {
                    name: found.corpus() for name in plan.metrics if (found := metric_rows(name, judged)) is not None
                }
                emit({"event": "answers", "step": step, "metrics": scores, "seconds": watch.seconds})
        return loss

    return evaluate


def _take_best(work: _Work, checkpoints: Checkpoints, progress: Progress) -> None:
    recipe = work.planned.recipe
    if recipe.train.best == "validation-loss" and progress.best_step not in (None, progress.step):
        checkpoints.load_weights(cast(int, progress.best_step), work.model, recipe.method)


def _commit_result(work: _Work) -> None:
    """Writes `adapter/` or `model/` with the tokenizer that belongs to it, after a last look at the weights."""
    method, model = work.planned.recipe.method, work.model
    trained = method.trained_tensors(model)
    refuse_dead_weights(trained, starting_at_zero=method.saved_as == "adapter")
    tokenizer, renderer, prepared = work.planned.tokenizer, work.planned.renderer, work.planned.prepared
    assert tokenizer is not None and renderer is not None and prepared is not None
    if model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(prepared.stop_ids)
    with committed_directory(work.run.path / method.saved_as) as directory:
        method.save(model, directory, base=work.planned.location)
        if renderer.template.jinja is not None:
            tokenizer.chat_template = renderer.template.jinja
        tokenizer.save_pretrained(directory)


def _record_end(run: Run, emit: Emit, error: TunesmithError) -> None:
    kind = "failed" if isinstance(error, TrainingError) else "interrupted"
    emit({"event": kind, "message": error.what})


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _notes(run: Run) -> list[str]:
    return [event["message"] for event in run.events() if event["event"] == "warning"]


def _with_verified_packing(planned: Planned, model: nn.Module) -> Plan:
    """Tests that packed rows do not see each other; falls back to padding when `auto` was asked."""
    plan, asked = planned.plan, planned.recipe.train.packing
    if not plan.packing:
        return plan
    obstacle = packing_obstacle(model) if planned.recipe.method.can_pack else "the method cannot pack"
    if obstacle is None:
        return plan
    if asked is True:
        raise InputError(
            f"rows cannot be packed for this model: {obstacle}",
            where="train.packing",
            fix="set train.packing: auto or false",
        )
    resolved = [item for item in plan.resolved if item.name != "train.packing"]
    resolved.append(Resolved(name="train.packing", value=False, reason=obstacle))
    return plan.model_copy(
        update={
            "packing": False,
            "resolved": resolved,
            "notes": [*plan.notes, f"rows are padded instead of packed: {obstacle}"],
        }
    )


def _opened(planned: Planned, existing: Run | None) -> Run:
    path = Path(planned.recipe.output)
    if existing is not None:
        return existing
    assert planned.prepared is not None
    if not is_main():
        wait_for_all()
        return Run(path)
    run = Run.create(path)
    run.write(PLAN, planned.plan.model_dump(mode="json"))
    run.write(DATA, planned.prepared.manifest())
    run.write(ENVIRONMENT, describe_environment())
    run.write_text(RECIPE, recipe_yaml(planned.recipe))
    wait_for_all()
    return run


def _refuse_another_recipe(run: Run, recipe: Recipe) -> None:
    """Raises InputError when the recipe is not the one that the run was started with, naming what differs."""
    before, _ = parse_yaml((run.path / RECIPE).read_text(encoding="utf-8"), str(run.path / RECIPE))
    now, _ = parse_yaml(recipe_yaml(recipe), "recipe")
    changed = [
        key
        for key in _flat_keys(now) | _flat_keys(before)
        if _flat_keys(now).get(key) != _flat_keys(before).get(key) and key != "output"
    ]
    if changed:
        key = sorted(changed)[0]
        raise InputError(
            f"{key} is {_flat_keys(now).get(key)!r} now and was {_flat_keys(before).get(key)!r} when the run began",
            where=run.path,
            fix="resume with the run's own recipe, or start a new run: output=runs/NAME",
        )


def _stored_plan(run: Run, planned: Planned) -> Plan:
    """The plan a resumed run goes on with.

    Raises:
        InputError: when the data is not what the run was started with, naming what differs.
    """
    assert planned.prepared is not None
    stored = run.read(DATA)
    for old, new in zip(stored["sources"], planned.prepared.sources, strict=True):
        if old["sha256"] != new["sha256"] or old["rows"] != new["rows"]:
            raise InputError(
                f"{new['path']} has changed since the run began",
                where=run.path,
                fix="restore the file, or start a new run: output=runs/NAME",
            )
    return Plan.model_validate(run.read(PLAN))


def _flat_keys(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    flat: dict[str, Any] = {}
    for name, inner in values.items():
        flat |= _flat_keys(inner, f"{prefix}{name}.")
    return flat
