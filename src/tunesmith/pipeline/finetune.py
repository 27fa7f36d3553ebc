"""The whole job: plan, load, judge the base, adapt, train, judge the result, report."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tunesmith.base import InputError, TunesmithError
from tunesmith.evaluation.benchmark_names import refuse_unknown
from tunesmith.models.decoder import decoder_of
from tunesmith.models.embeddings import teach_tokens
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.freed_memory import give_back_freed, keep_memory_small
from tunesmith.models.load import Loading, load_judge, load_model, weights_directory
from tunesmith.models.streamed import load_streamed
from tunesmith.pipeline.budgeting import refuse_beyond_budget
from tunesmith.pipeline.calibration import timed_if_long
from tunesmith.pipeline.distilling import with_teacher
from tunesmith.pipeline.environment import describe_environment
from tunesmith.pipeline.features import with_features
from tunesmith.pipeline.lineage import LINEAGE, MANIFEST, describe_lineage, write_manifest
from tunesmith.pipeline.planning import Planned, plan_job
from tunesmith.pipeline.proof import Proof, stored_evaluation, write_page, written_report
from tunesmith.pipeline.reference import with_reference
from tunesmith.pipeline.reproduce import REPRODUCE, reproduce_script
from tunesmith.pipeline.resuming import refuse_another_recipe, resumed_plan
from tunesmith.pipeline.room import refuse_too_little_room
from tunesmith.pipeline.sinks import check_sinks, open_sinks
from tunesmith.pipeline.starting import with_merged_start
from tunesmith.pipeline.stopping import Stopping
from tunesmith.pipeline.training import BLOCKS, train_model
from tunesmith.pipeline.usage import PeakMemory, Stopwatch, process_peak_bytes
from tunesmith.pipeline.work import Watcher, Work
from tunesmith.plan.hardware import DTYPES
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import recipe_yaml
from tunesmith.resolved import Plan, Resolved
from tunesmith.run import (
    BASE_EVALUATION,
    DATA,
    ENVIRONMENT,
    PLAN,
    PROMPTED_EVALUATION,
    RECIPE,
    REPORT,
    TUNED_EVALUATION,
    Run,
)
from tunesmith.train.loop import Emit
from tunesmith.train.parallel import is_main, join_processes, leave_processes, wait_for_all, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Watcher", "finetune"]

DISK_TROUBLES = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def finetune(
    recipe: Recipe,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    parent: Path | None = None,
    forced: Sequence[str] = (),
) -> Run:
    """Does the whole job and returns its run.

    Args:
        recipe: what is asked; `read_recipe` makes one from a file.
        resume: go on with the run that stands in `recipe.output`, from its last checkpoint and with its plan; start it
            when there is nothing yet.
        watcher: receives progress and events.
        parent: the run that this one repeats, for its lineage.
        forced: keys of the recipe that may differ from what a resumed run was started with; the change is recorded.

    Raises:
        InputError: the recipe, data or model is wrong; nothing is left behind.
        TrainingError: the run diverged or collapsed; its last good checkpoint is kept.
        Interrupted: after Ctrl-C or SIGTERM; the run can be resumed.
    """
    watcher = watcher or Watcher()
    # A recipe that was made in Python has no file whose name its run could take.
    recipe = recipe.model_copy(update={"output": recipe.output.replace("{name}", "run")})
    if recipe.budget.memory is not None:
        keep_memory_small()
    path = Path(recipe.output)
    run = Run.to_resume(path) if resume else None
    if run is None:
        Run.refuse_occupied(path)
    else:
        refuse_another_recipe(run, recipe, forced)
        if run.report is not None:
            if is_main() and not (run.path / MANIFEST).is_file():  # killed in the last instant
                with run.locked():  # which clears away what was half-written then
                    write_manifest(run)
            return run
    check_sinks(list(recipe.train.log))
    if recipe.evaluate != "off" and recipe.evaluate.benchmarks:
        refuse_unknown(recipe.evaluate.benchmarks, "evaluate.benchmarks")
    with _disk_troubles_told(path):
        planned = plan_job(recipe, watcher.progress)
        if run is not None:
            planned = planned.with_plan(resumed_plan(run, planned, forced))
        else:
            planned = timed_if_long(planned, watcher.progress)
            refuse_beyond_budget(recipe, planned.plan)
        joined = join_processes(planned.hardware.device)
        try:
            return _execute(planned, run, watcher, parent, tuple(forced))
        finally:
            if joined:
                leave_processes()


@contextmanager
def _disk_troubles_told(path: Path) -> Iterator[None]:
    """A full or failing disk can meet any write; what was committed before is whole."""
    try:
        yield
    except OSError as error:
        if error.errno in NOT_WRITABLE:
            raise InputError(
                f"the run's directory cannot be written: {error.strerror}",
                where=path,
                fix="make it writable and continue with --resume, or name another one: output=runs/NAME",
            ) from error
        if error.errno not in DISK_TROUBLES:
            raise
        raise TunesmithError(
            f"a file cannot be written: {error.strerror}; what was committed before is whole",
            where=error.filename or path,
            fix="make room, then continue with --resume",
        ) from error


def _execute(
    planned: Planned, existing: Run | None, watcher: Watcher, parent: Path | None, forced: tuple[str, ...]
) -> Run:
    recipe = planned.recipe
    with Stopping() as stopping, PeakMemory(planned.hardware.device) as memory:
        planned = with_teacher(with_merged_start(planned, watcher.progress), watcher.progress)
        watcher.progress("loading the model", 0, None)
        model, planned = load_base(planned)
        if recipe.model.add_tokens and planned.tokenizer is not None:
            ids = planned.tokenizer.convert_tokens_to_ids(recipe.model.add_tokens)
            teach_tokens(model, dict(zip(recipe.model.add_tokens, cast(list[int], ids), strict=True)))
        planned = planned.with_plan(_with_verified_packing(planned, model))
        planned = with_features(planned, model, watcher.progress)
        planned = with_reference(planned, model, watcher.progress)
        proof = None if recipe.evaluate == "off" else Proof(planned, recipe.evaluate)
        run = existing or _opened(planned, parent, watcher)
        watcher.plan(planned.plan)
        if not is_main():
            return _work(Work(planned, run, model, None, watcher, stopping, forced), memory)
        with run.locked():
            return _work(Work(planned, run, model, proof, watcher, stopping, forced), memory)


def load_base(planned: Planned) -> tuple[PreTrainedModel, Planned]:
    """The base, in memory or read from its files block by block, and what its files settle of a head."""
    spec, dtype, device = planned.recipe.model, DTYPES[planned.plan.frozen_dtype], planned.hardware.device
    tokens = planned.plan.streamed_tokens
    if tokens is not None:
        keep_memory_small()  # once more: reading rows has left holes
        directory = weights_directory(planned.location, spec.revision)
        model = load_streamed(directory, planned.config, dtype=dtype, tokens_at_once=tokens)
        return cast(Any, model), planned
    if planned.judges is None:
        model = load_model(
            planned.location, dtype=dtype, device=device, revision=spec.revision, quantized=spec.quantization
        )
        return model, planned
    torch.manual_seed(planned.recipe.seed)  # before a new head is drawn
    loading = Loading(dtype, device, spec.revision, spec.quantization)
    model, head, new, settled = load_judge(planned.location, planned.judges.task_head(), loading)
    plan, objective = planned.plan, planned.judges
    if head.pooling != planned.judges.task_head().pooling and head.kind == "sequence":
        found = Resolved(name="objective.pooling", value=head.pooling, reason=settled.why)
        notes = [*plan.notes, settled.note] if settled.note else plan.notes
        plan = plan.model_copy(update={"resolved": [*plan.resolved, found], "notes": notes})
        objective = objective.model_copy(update={"pooling": head.pooling})
    return model, replace(planned, plan=plan, objective=objective, head_is_new=new)


def _work(work: Work, memory: PeakMemory) -> Run:
    planned, run, model = work.planned, work.run, work.model
    recipe, progress = planned.recipe, work.watcher.progress
    sinks = [run.append_event, work.watcher.event, *open_sinks(list(recipe.train.log), run)] if is_main() else []

    def emit(event: dict[str, Any]) -> None:
        for sink in sinks:
            sink(event)
        if planned.plan.streamed_tokens is not None:
            keep_memory_small()

    evaluating = Stopwatch()
    if is_main():
        stored_evaluation(run, BASE_EVALUATION, work.proof and partial(work.proof.evaluate_base, model, progress))
        if work.proof is not None and work.proof.has_prompt:
            stored_evaluation(run, PROMPTED_EVALUATION, partial(work.proof.evaluate_prompted, model, progress))
    base_seconds = evaluating.seconds
    give_back_freed()
    wait_for_all()
    measured = train_model(work, emit)
    give_back_freed()
    wait_for_all()
    if not is_main():
        return run
    evaluating = Stopwatch()
    proof = work.proof
    stored_evaluation(
        run, TUNED_EVALUATION, proof and (lambda: proof.evaluate_tuned(model, run.read(BASE_EVALUATION), progress))
    )
    measured["evaluate_seconds"] = base_seconds + evaluating.seconds
    measured["seconds"] = measured["train_seconds"] + measured["evaluate_seconds"]
    measured["peak_bytes"] = memory.so_far()
    if recipe.budget.memory_bytes is not None:
        measured["peak_bytes"] = process_peak_bytes()
        _tell_of_overdraft(recipe.budget.memory_bytes, measured["peak_bytes"], planned.plan.steps, emit)
    report = written_report(run, planned, work.proof, measured, _notes(run))
    emit({"event": "end", "verdict": report["verdict"], "sentence": report["sentence"], "report": str(run.page)})
    write_page(run, report)
    # Last, because a run with a report is a finished one.
    run.write(REPORT, report)
    write_manifest(run)
    return run


def _tell_of_overdraft(budget: int, peak: int, step: int, emit: Emit) -> None:
    if peak > budget:
        text = f"the process had {peak / 1e6:,.0f} MB at its peak, more than budget.memory ({budget / 1e6:,.0f} MB)"
        emit({"event": "warning", "step": step, "message": text})


def _notes(run: Run) -> list[str]:
    return [event["message"] for event in run.events() if event["event"] == "warning"]


def _with_verified_packing(planned: Planned, model: nn.Module) -> Plan:
    """Tests that packed rows do not see each other; falls back to padding when `auto` was asked."""
    plan, asked = planned.plan, planned.recipe.train.packing
    method = planned.recipe.method
    if not (plan.packing or method.must_pack):
        return plan
    obstacle = packing_obstacle(model) if method.can_pack else "the method cannot pack"
    if obstacle is not None and method.must_pack:
        raise InputError(
            f"{method.kind} needs attention over segments, and this model does not take it: {obstacle}",
            where="method.kind",
            fix="use prompt, adapter or lora",
        )
    if not plan.packing:
        return plan
    if obstacle is None:
        return _with_blocks(plan, model, sharded=planned.recipe.train.shard and world_size() > 1)
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


def _with_blocks(plan: Plan, model: nn.Module, *, sharded: bool) -> Plan:
    """Says whose decoder blocks will run: the fast form of them, or transformers' own and why."""
    found = decoder_of(model)
    value, reason = "fused", "the same hidden states as transformers' own blocks"
    if sharded:
        found = "their weights are spread over processes"
    if isinstance(found, str):
        value, reason = "transformers' own", found
    others = [item for item in plan.resolved if item.name != BLOCKS]
    return plan.model_copy(update={"resolved": [*others, Resolved(name=BLOCKS, value=value, reason=reason)]})


def _opened(planned: Planned, parent: Path | None, watcher: Watcher) -> Run:
    """A new run's directory, which comes to be whole or not at all."""
    path = Path(planned.recipe.output)
    assert planned.prepared is not None
    if not is_main():
        wait_for_all()
        return Run(path)
    refuse_too_little_room(path, planned.plan, planned.recipe)
    environment, lineage = describe_environment(), describe_lineage(path, planned, parent, watcher.progress)
    run = Run.create(
        path,
        {
            PLAN: planned.plan.model_dump(mode="json"),
            DATA: planned.prepared.manifest(),
            ENVIRONMENT: environment,
            LINEAGE: lineage,
        },
        {RECIPE: recipe_yaml(planned.recipe), REPRODUCE: reproduce_script(lineage, environment, planned.recipe.output)},
    )
    wait_for_all()
    return run
