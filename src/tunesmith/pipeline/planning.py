"""Everything that can be known before a weight is loaded: data, plan, and what the evaluation will be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.render_documents import DocumentRenderer
from tunesmith.data.render_labelled import LabelRenderer
from tunesmith.data.render_pairs import PairRenderer
from tunesmith.data.render_prompts import PromptRenderer
from tunesmith.data.sources import source_specs
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import RenderedRows
from tunesmith.models.embeddings import add_tokens, teach_tokens
from tunesmith.models.load import load_tokenizer, read_config, read_plain_config, stop_token_ids
from tunesmith.models.measure import meta_model, position_limit
from tunesmith.models.streamed import StreamedModel, streaming_obstacle
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives import (
    Distill,
    Policy,
    Preference,
    Pretrain,
    Reward,
    TaskObjective,
    TrainingObjective,
)
from tunesmith.pipeline.choosing_metrics import judged_by
from tunesmith.pipeline.heaviest import heaviest_of
from tunesmith.pipeline.judging import label_renderer, refuse_settings_of_writing, with_labels
from tunesmith.pipeline.locating import Location
from tunesmith.pipeline.own_answers import Base, with_own_answers
from tunesmith.pipeline.own_metrics import NO_METRICS, OwnMetrics
from tunesmith.pipeline.policy import (
    policy_notes,
    policy_workload,
    prompt_renderer,
    refuse_unfit_prompts,
    refuse_unfit_recipe,
)
from tunesmith.pipeline.preference_rows import preference_renderer, refuse_encoder, with_partners
from tunesmith.pipeline.rewards import Scorer
from tunesmith.pipeline.starting import merged_config, start_of, with_start_told
from tunesmith.pipeline.teacher import Teacher, base_on_disk, find_teacher, kept_on_disk, refuse_unfit_rows
from tunesmith.plan.given import Given, Judged
from tunesmith.plan.hardware import Hardware, detect_hardware, native_dtypes
from tunesmith.plan.resolve import resolve, steps_of
from tunesmith.plan.streaming import may_stream
from tunesmith.recipe import Recipe
from tunesmith.resolved import Plan, Resolved, Workload
from tunesmith.train.near_base import REPLAYED, base_is_kept, refuse_unreachable_base
from tunesmith.train.parallel import world_size


@dataclass(frozen=True)
class Planned:
    """A job that is ready to start.

    Attributes:
        location: directory or hub id of the model.
        given: what the plan was made from besides the recipe.
        start: the adapter that the job starts from, where it does; before it is merged, `location` is that of its base.
        prepared: the data; None when the plan was made without it.
        objective: the recipe's, with what the data and the model settle filled in.
        head_is_new: whether the base has no head for these labels, so that it is compared with a constant answer.
        score: what answers are worth, where the objective rewards them.
        own: the metrics that the recipe brings along.
        teacher: whom the model learns from, if anybody.
    """

    recipe: Recipe
    plan: Plan
    location: str
    config: PreTrainedConfig
    hardware: Hardware
    tokenizer: PreTrainedTokenizerBase | None
    renderer: Renderer | LabelRenderer | PairRenderer | PromptRenderer | None
    prepared: Prepared | None
    objective: TrainingObjective
    head_is_new: bool = False
    score: Scorer | None = None
    own: OwnMetrics = NO_METRICS
    teacher: Teacher | None = None
    start: Location | None = None
    given: Given | None = None

    def with_plan(self, plan: Plan) -> Planned:
        return replace(self, plan=plan)

    @property
    def judges(self) -> TaskObjective | None:
        """The objective, when the model judges instead of writing."""
        return self.objective if isinstance(self.objective, TaskObjective) else None


def plan_job(recipe: Recipe, progress: Progress = silent) -> Planned:
    """Reads and renders the data and makes the plan that `finetune` executes.

    Raises:
        InputError: for anything wrong with model, data or settings.
    """
    start = start_of(recipe, progress)
    location, config = start.base, config_of(recipe, start)
    objective: TrainingObjective = recipe.objective
    limit = position_limit(config)
    tokenizer = load_tokenizer(
        start.tokenizer, recipe.model.revision, config, writes=not isinstance(objective, TaskObjective)
    )
    config = merged_config(config, start, tokenizer)
    added = add_tokens(tokenizer, recipe.model.add_tokens)
    model = architecture_of(recipe, config, location)
    renderer = _renderer(recipe, tokenizer, model, config, location)
    data, said = with_own_answers(recipe, Base.of(start, config, tokenizer), progress)
    teacher = find_teacher(recipe, tokenizer, progress)
    prepared = prepare(
        data,
        renderer,
        model_limit=limit,
        seed=recipe.seed,
        wants_test=recipe.evaluate != "off",
        progress=progress,
        alone=recipe.budget.memory is not None,
    )
    prepared = _named_as_asked(prepared, recipe, data, said)
    if isinstance(objective, TaskObjective):
        prepared, objective = with_labels(prepared, objective)
        model = meta_model(config, location, objective.task_head())
    prepared = _as_the_objective_reads_it(recipe, prepared, objective, limit)
    teach_tokens(model, added)
    workload = policy_workload(prepared, objective) if isinstance(objective, Policy) else _counted(prepared)
    hardware = detect_hardware()
    given = _given(recipe, prepared, workload, judged_by(recipe, prepared, objective), teacher)
    plan = resolve(recipe, model, hardware, given)
    found = [*plan.resolved, *_found_in_data(recipe, prepared), *_found_in_labels(recipe.objective, objective)]
    notes = [*plan.notes, *prepared.notes]
    if teacher is not None and isinstance(renderer, Renderer):
        found.append(kept_on_disk(recipe, prepared))
        notes += refuse_unfit_rows(teacher, recipe, prepared, renderer)
    if base_is_kept(recipe):
        found.append(base_on_disk(prepared))
    if recipe.train.shard and world_size() == 1:
        notes.append("train.shard spreads nothing over one process; torchrun starts several")
    score = None
    if isinstance(objective, Policy):
        score = Scorer.of(objective.reward, plan.frozen_dtype)
        found += [
            Resolved(name=name, value=value, reason="hash of its content") for name, value in score.record.items()
        ]
        notes += policy_notes(recipe, plan, objective)
    own = OwnMetrics.of([] if recipe.evaluate == "off" else recipe.evaluate.own_metrics)
    found += [Resolved(name=name, value=value, reason="hash of its content") for name, value in own.record.items()]
    plan = with_start_told(plan.model_copy(update={"notes": notes, "resolved": found}), recipe, start)
    adapter = start if start.adapter is not None else None
    planned = Planned(recipe, plan, location, config, hardware, tokenizer, renderer, prepared, objective)
    return replace(planned, score=score, own=own, teacher=teacher, start=adapter, given=given)


def _renderer(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: nn.Module, config: PreTrainedConfig, location: str
) -> Renderer | LabelRenderer | PairRenderer | PromptRenderer:
    """What makes tokens of the objective's rows; settings that do not go with it are refused."""
    objective: TrainingObjective = recipe.objective
    if isinstance(objective, TaskObjective):
        refuse_settings_of_writing(recipe, int(config.get_text_config().num_hidden_layers))
        stop_ids = _stop_ids(tokenizer, config, location)
        if isinstance(objective, Reward):
            refuse_encoder(model)
            return preference_renderer(objective, recipe.data, tokenizer, stop_ids)
        return label_renderer(objective, recipe.data, tokenizer, model, stop_ids)
    stop_ids = stop_token_ids(tokenizer, config, location)
    if isinstance(objective, Policy):
        refuse_unfit_recipe(recipe, objective)
        return prompt_renderer(recipe.data, tokenizer, stop_ids)
    if isinstance(objective, Preference):
        return preference_renderer(objective, recipe.data, tokenizer, stop_ids)
    reads = DocumentRenderer if isinstance(objective, Pretrain) else Renderer
    return reads.of(recipe.data, tokenizer, stop_ids)


def _as_the_objective_reads_it(
    recipe: Recipe, prepared: Prepared, objective: TrainingObjective, limit: int
) -> Prepared:
    """Rows with what the objective wants of them besides; combinations that cannot be are refused."""
    refuse_unreachable_base(recipe)
    if recipe.method.trunk_is_frozen and getattr(objective, "noise", 0.0):
        raise InputError(
            "the frozen trunk is read once, and there is no step in which noise could reach it",
            where="objective.noise",
            fix="remove it, or use another method",
        )
    if recipe.train.kl_on == "replay":
        prepared = replace(prepared, train=_marked(prepared))
    if isinstance(objective, Preference):
        prepared = with_partners(prepared, objective, limit)
    if isinstance(objective, Policy):
        refuse_unfit_prompts(prepared, recipe, objective, limit)
    return prepared


def _given(recipe: Recipe, prepared: Prepared, workload: Workload, judged: Judged, teacher: Teacher | None) -> Given:
    """What data and teacher say of the job's size."""
    heaviest = None
    if not isinstance(recipe.objective, Policy):
        padded = recipe.train.packing is False or not recipe.method.can_pack
        heaviest = heaviest_of(prepared, recipe.train.batch_size, steps_of(recipe, workload), padded=padded)
    other = 0.0
    if teacher is not None and not teacher.itself:
        where = teacher.location.base
        size = sum(map(Tensor.numel, meta_model(read_config(where, teacher.revision), where).parameters()))
        narrow = recipe.train.dtype != "fp32" and "bf16" in native_dtypes(detect_hardware().device)
        other = size * (2.0 if narrow else 4.0)
    stays = isinstance(recipe.objective, Distill) and recipe.objective.on_policy > 0
    return Given(workload, judged, prepared.max_length, heaviest, other if stays else 0.0, other)


def _named_as_asked(prepared: Prepared, recipe: Recipe, data: DataSpec, said: list[str]) -> Prepared:
    """The data under the names that the recipe has for them: where the base's own answers are kept is nobody's name."""
    asked, used = recipe.data.replay, data.replay
    if asked is None or used is None or asked.path == used.path:
        return prepared

    def named(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**entry, "path": asked.path if entry["path"] == used.path else entry["path"]} for entry in entries]

    return replace(
        prepared,
        sources=named(prepared.sources),
        mixture=named(prepared.mixture),
        notes=[note.replace(used.path, asked.path) for note in (*said, *prepared.notes)],
    )


def _marked(prepared: Prepared) -> RenderedRows:
    """Training rows that say of each target whether its row is replayed."""
    replayed = set(prepared.order.members[-1].tolist())

    def mark(at: int, item: Rendered) -> dict[str, Tensor]:
        return {REPLAYED: torch.full((item.example.targets,), float(at in replayed))}

    return prepared.train.adding(mark)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, location: str) -> set[int]:
    """Those of a conversation's template, where the tokenizer knows any."""
    return stop_token_ids(tokenizer, config, location) if tokenizer.eos_token_id is not None else set()


def _found_in_labels(asked: TrainingObjective, settled: TrainingObjective) -> list[Resolved]:
    """What the training rows settled of the objective."""
    reasons = {"labels": "those of the training rows", "class_weights": "rows of each label", "spread": "their spread"}
    found = []
    for name, reason in reasons.items():
        before, after = getattr(asked, name, None), getattr(settled, name, None)
        if before != after:
            shown = f"{len(after)} labels" if isinstance(after, (list, dict)) and len(after) > 12 else after
            found.append(Resolved(name=f"objective.{name}", value=shown, reason=reason))
    return found


def config_of(recipe: Recipe, start: Location) -> PreTrainedConfig:
    read = read_plain_config if recipe.budget.memory is not None and may_stream(recipe) else read_config
    return read(start.base, start.revision or recipe.model.revision)


def architecture_of(recipe: Recipe, config: PreTrainedConfig, location: str) -> nn.Module:
    """The modules without weights; under a memory budget without transformers' own, which take memory to import."""
    if recipe.budget.memory is not None and may_stream(recipe) and streaming_obstacle(config) is None:
        return StreamedModel(config)
    return meta_model(config, location, _guessed_head(recipe.objective))


def _found_in_data(recipe: Recipe, prepared: Prepared) -> list[Resolved]:
    """What `auto` became by looking at the files themselves."""
    found = []
    declared = {source.path: source.format for source in source_specs(recipe.data)}
    for source in prepared.sources:
        if declared.get(source["path"], recipe.data.format) == "auto":
            reason = f"the columns of {source['path']}"
            found.append(Resolved(name="data.format", value=source["format"], reason=reason))
    if recipe.data.template == "auto" and not isinstance(recipe.objective, TaskObjective | Pretrain):
        found.append(Resolved(name="data.template", value=prepared.template, reason="what the model was made for"))
    if recipe.data.test == "auto" and prepared.test:
        found.append(Resolved(name="data.test", value=f"{len(prepared.test)} rows", reason=prepared.test_from))
    return found


def _guessed_head(objective: TrainingObjective) -> TaskHead | None:
    """The head that an objective asks for, with two labels where nobody knows them yet."""
    if not isinstance(objective, TaskObjective):
        return None
    known = getattr(objective, "labels", ())
    return TaskHead("token" if objective.words else "sequence", ("", " ") if known == "auto" else tuple(known) or ("",))


def _counted(prepared: Prepared) -> Workload:
    train = prepared.train
    return Workload(
        rows=len(train),
        epoch_rows=prepared.order.epoch_rows,
        tokens=int(train.lengths.sum()),
        targets=int(train.targets.sum()),
        longest=int(train.lengths.max()),
        estimated=False,
    )
