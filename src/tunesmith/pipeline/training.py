"""The training part of a job: adapt the model, run the steps, keep checkpoints, commit the result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from tunesmith.base import TrainingError, TunesmithError
from tunesmith.methods import trainable_parameters
from tunesmith.methods.token_rows import trained_token_ids
from tunesmith.models.decoder import decoder_of
from tunesmith.models.embeddings import untrained_tokens
from tunesmith.models.freed_memory import keep_memory_small
from tunesmith.models.sharding import is_sharded, made_whole, shard
from tunesmith.models.task_head import head_modules
from tunesmith.objectives import Policy, StepObjective
from tunesmith.pipeline import probe
from tunesmith.pipeline.committing import commit_result
from tunesmith.pipeline.distilling import with_own_answers
from tunesmith.pipeline.environment import code_sha256
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.policy import Kept, reference_of, served_answers, total_prompts, with_value_head
from tunesmith.pipeline.resuming import record_changes
from tunesmith.pipeline.usage import Stopwatch
from tunesmith.pipeline.validating import validation
from tunesmith.pipeline.work import Work
from tunesmith.plan.hardware import DTYPES
from tunesmith.recipe_file import recipe_yaml
from tunesmith.train.average import Average
from tunesmith.train.batches import StepBatches
from tunesmith.train.checkpoint import Checkpoints, Saved
from tunesmith.train.health import Health
from tunesmith.train.loop import Emit, Job, MicroBatches, Progress, train
from tunesmith.train.near_base import NearBase, base_is_kept, refuse_other_heads
from tunesmith.train.optim import build_optimizer
from tunesmith.train.parallel import is_main, wait_for_all, world_size
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import random_states_of_all
from tunesmith.train.rollouts import Drawing, Rollouts
from tunesmith.train.small_adamw import SmallAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCKS = "decoder blocks"
"""Name of what a plan says about them."""


def train_model(work: Work, emit: Emit) -> dict[str, Any]:
    """Adapts and trains the model and commits the result; returns what it took."""
    planned, run, model = work.planned, work.run, work.model
    saved = _adapted(work)
    batches: MicroBatches
    notes = list[str]()
    if isinstance(planned.objective, Policy):
        batches, notes = _rollouts(work, planned.objective, saved, emit)
        saved = replace(saved, beside=Kept(batches, model))
    else:
        batches = with_own_answers(planned, model, _batches(planned))
    objective = _near_base(work)
    checkpoints = Checkpoints(run.checkpoints, planned.recipe.train.keep, _identity(planned))
    progress = _where_it_stands(work, checkpoints, saved, emit)
    if progress.step == 0:  # what was said before is cut off with the events of a run that had not got this far
        _tell_of_other_blocks(work, emit)
        for message in notes:
            emit({"event": "note", "step": 0, "message": message})

    job = _job(work, saved, objective, batches, checkpoints, emit)
    watch = Stopwatch()
    work.stopping.graceful = True
    try:
        progress = train(job, progress, evaluate=validation(work, emit), emit=emit)
    except TunesmithError as error:
        if is_main():
            _record_end(emit, error)
        raise
    finally:
        work.stopping.graceful = False
    _finish(work, checkpoints, progress, saved, emit)
    seconds = sum(event["seconds"] for event in run.events() if event["event"] in ("step", "validation"))
    return {
        "train_seconds": max(seconds, watch.seconds),
        "tokens_per_second": progress.tokens / max(1e-9, seconds),
    }


def _job(
    work: Work,
    saved: Saved,
    objective: StepObjective,
    batches: MicroBatches,
    checkpoints: Checkpoints,
    emit: Emit,
) -> Job:
    """What the loop is told; it saves to ``checkpoints``, and goes back to them."""
    planned, run, model = work.planned, work.run, work.model
    plan = planned.plan

    def save(now: Progress, best: bool) -> None:
        if plan.streamed_tokens is not None:
            saved.optimizer.zero_grad(set_to_none=True)
        states = random_states_of_all(planned.hardware.device)
        snapshot = saved.snapshot() if is_main() or is_sharded(model) else None
        if is_main() and snapshot is not None:
            checkpoints.save(now, snapshot, states, run.synced_events())
        if plan.streamed_tokens is not None:
            del snapshot
            keep_memory_small()
            cast(SmallAdamW, saved.optimizer).let_go()
        wait_for_all()

    def go_back() -> Progress | None:
        newest = checkpoints.newest_sound(_warning(emit, 0))
        return None if newest is None else checkpoints.restore(newest, saved)

    return Job(
        model,
        objective,
        saved.optimizer,
        saved.precision,
        planned.recipe.train,
        plan,
        batches,
        save,
        work.stopping.asked,
        go_back,
        saved.average,
    )


def _finish(work: Work, checkpoints: Checkpoints, progress: Progress, saved: Saved, emit: Emit) -> None:
    """From the last step to the committed result."""
    if work.planned.plan.gradient_checkpointing:
        work.model.gradient_checkpointing_disable()
    _take_best(work, checkpoints, progress, saved)
    saved.optimizer.zero_grad(set_to_none=True)
    made_whole(work.model)
    if is_main():
        _close_with_solver(work, emit)
        commit_result(work)
        emit(_trained(progress))


def _trained(progress: Progress) -> dict[str, Any]:
    return {
        "event": "trained",
        "step": progress.step,
        "best_step": progress.best_step,
        "best_loss": progress.best_loss,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.health.skipped + len(progress.passed_over),
    }


def _adapted(work: Work) -> Saved:
    """Makes the model trainable, with its optimizer; seeds are set before any parameter is made."""
    planned, model = work.planned, work.model
    recipe, plan = planned.recipe, planned.plan
    method = recipe.method
    if plan.streamed_tokens is not None:
        keep_memory_small()
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    method.adapt(model)
    with_value_head(model, planned.objective)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.train.shard and world_size() > 1:
        shard(model)
    casts = method.needs_autocast or plan.dtype != plan.frozen_dtype
    precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)
    rates = {**method.rates(model), **_rates_of_new_head(planned, model)}
    optimizer = build_optimizer(model, recipe.train, plan.learning_rate, rates, small=plan.streamed_tokens is not None)
    average = None if recipe.train.ema == "off" else Average(model, recipe.train.ema)
    return Saved(model, method, optimizer, precision, average)


def _near_base(work: Work) -> StepObjective:
    """The objective with the recipe's penalties; made before a checkpoint is put back, while the model is the base."""
    train = work.planned.recipe.train
    if train.kl_to_base and not base_is_kept(work.planned.recipe):
        refuse_other_heads(work.model)
    asked = train.kl_to_base or train.l2_to_base
    return NearBase(work.planned.objective, work.model, train) if asked else work.planned.objective


def _rates_of_new_head(planned: Planned, model: PreTrainedModel) -> dict[str, float]:
    """Factors on the learning rate of a head that begins at random beside weights that have been trained."""
    judges, method = planned.judges, planned.recipe.method
    if judges is None or not planned.head_is_new or method.trunk_is_frozen:
        return {}
    heads, before = tuple(f"{name}." for name in head_modules(model)), method.rates(model)
    trained = trainable_parameters(model)
    return {name: before.get(name, 1.0) * judges.head_rate for name in trained if name.startswith(heads)}


def _tell_of_other_blocks(work: Work, emit: Emit) -> None:
    """A method may have put layers where the fused blocks, which the plan has found to fit, cannot run them."""
    planned = {item.name: item.value for item in work.planned.plan.resolved}.get(BLOCKS)
    found = decoder_of(work.model)
    if planned == "fused" and isinstance(found, str):
        _warning(emit, 0)(f"transformers' own blocks run instead of the fused ones: {found}")


def _where_it_stands(work: Work, checkpoints: Checkpoints, saved: Saved, emit: Emit) -> Progress:
    """The progress of the newest sound checkpoint, from which everything is put back; a fresh one without any."""
    planned, warnings = work.planned, list[str]()
    newest = checkpoints.newest_sound(warnings.append)
    health = Health(vocabulary=_choices(planned), loss_measures=planned.objective.loss_measures)
    progress = Progress(health=health)
    if newest is not None:
        progress = checkpoints.restore(newest, saved, warnings.append)
    if is_main():
        whole = work.run.truncate_events(0 if newest is None else checkpoints.events_bytes(newest))
        if not whole:
            warnings.append("events.jsonl was cut off by something else; some of its events are lost")
        if newest is not None:
            checkpoints.purge(progress)
    for text in warnings:
        _warning(emit, progress.step)(text)
    if newest is None:
        _warn_of_untrained_tokens(work, emit)
    if work.forced and is_main():
        record_changes(work.run, planned, progress.step)
        _warning(emit, progress.step)(f"resumed with changes of {', '.join(work.forced)}, recorded in changes.json")
    return progress


def _choices(planned: Planned) -> int:
    """Among how many a target is chosen; 0 where it is a number, or several of them at once."""
    head = planned.judges.task_head() if planned.judges is not None else None
    if head is None:
        return int(planned.config.get_text_config().vocab_size)
    return len(head.labels) if head.problem == "single_label_classification" else 0


def _warning(emit: Emit, step: int) -> Callable[[str], None]:
    return lambda text: emit({"event": "warning", "step": step, "message": text})


def _identity(planned: Planned) -> dict[str, Any]:
    """What a run is made from."""
    assert planned.prepared is not None
    return {
        "recipe": recipe_yaml(planned.recipe),
        "data": [source["sha256"] for source in planned.prepared.sources],
        "code": code_sha256(),
    }


def _batches(planned: Planned) -> StepBatches:
    assert planned.prepared is not None
    return StepBatches.of_job(planned.recipe, planned.plan, planned.prepared.train, planned.prepared.order)


def _rollouts(work: Work, objective: Policy, saved: Saved, emit: Emit) -> tuple[Rollouts, list[str]]:
    """Where the batches of such a job come from, and what a user should know of it."""
    planned, model = work.planned, work.model
    recipe, plan, prepared = planned.recipe, planned.plan, planned.prepared
    assert prepared is not None and planned.tokenizer is not None and planned.score is not None
    notes = list[str]()
    if shared := planned.score.share(model):
        notes.append(f"{shared:,} weights of the reward model are those of the trained model's base, and are held once")
    server = served_answers(planned, objective, work.run.path)
    drawing = Drawing(
        tokenizer=planned.tokenizer,
        stop_ids=frozenset(prepared.stop_ids),
        score=planned.score,
        reference=reference_of(recipe, objective, model),
        precision=saved.precision,
        seed=recipe.seed,
        batch_size=recipe.train.batch_size,
        total_rows=total_prompts(recipe, plan, prepared, objective),
        stop=work.stopping.asked if world_size() == 1 else lambda: False,
        emit=emit,
        server=server,
    )
    notes += [] if server is None else server.check()
    return Rollouts(model, objective, prepared.train, prepared.order, plan, drawing), notes


def _warn_of_untrained_tokens(work: Work, emit: Emit) -> None:
    """A control token that the base never saw stays noise when its embedding is frozen."""
    planned, model = work.planned, work.model
    assert planned.renderer is not None and planned.tokenizer is not None
    trained = trained_token_ids(model)
    if not trained and any(weight.requires_grad for weight in model.get_input_embeddings().parameters()):
        return
    found = untrained_tokens(model, set(planned.renderer.used_controls) - set(trained))
    if found:
        names = ", ".join(cast(list[str], planned.tokenizer.convert_ids_to_tokens(found)))
        message = (
            f"the template writes {names}, which this model seems never to have been trained on, and the embeddings "
            f"are frozen: train them with LoRA's method.trainable_tokens: [{names}], or choose another data.template"
        )
        emit({"event": "warning", "step": 0, "message": message})


def _take_best(work: Work, checkpoints: Checkpoints, progress: Progress, saved: Saved) -> None:
    recipe = work.planned.recipe
    if saved.average is not None:
        saved.average.exchange()
    if recipe.train.best == "validation-loss" and progress.best_step not in (None, progress.step):
        checkpoints.load_weights(cast(int, progress.best_step), work.model, recipe.method)


def _close_with_solver(work: Work, emit: Emit) -> None:
    if probe.obstacle(work.planned, work.model) is None:
        emit({"event": "solver", **probe.close(work.planned, work.model, work.watcher.progress)})


def _record_end(emit: Emit, error: TunesmithError) -> None:
    kind = "failed" if isinstance(error, TrainingError) else "interrupted"
    emit({"event": kind, "message": error.what})
