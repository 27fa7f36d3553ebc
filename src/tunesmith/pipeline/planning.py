"""Everything that can be known before a weight is loaded: data, plan, and what the evaluation will be."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.presets import PRESETS
from tunesmith.data.read import STANDARD_INPUT
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.render_documents import DocumentRenderer
from tunesmith.data.render_labelled import LabelRenderer
from tunesmith.data.render_pairs import PairRenderer
from tunesmith.data.render_prompts import PromptRenderer
from tunesmith.data.sources import readings, source_specs
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import RenderedRows
from tunesmith.evaluation.compare import LIKELIHOODS, choose_metrics
from tunesmith.metrics import MARGIN, OF_DOCUMENTS, PREFERENCE_ACCURACY, REWARD_ACCURACY
from tunesmith.models.embeddings import add_tokens, teach_tokens, vocabulary_rows
from tunesmith.models.load import load_tokenizer, read_config, read_plain_config, stop_token_ids
from tunesmith.models.measure import meta_model, position_limit
from tunesmith.models.streamed import StreamedModel, streaming_obstacle
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives import (
    Distill,
    Pairwise,
    Policy,
    Preference,
    Pretrain,
    Reward,
    TaskObjective,
    TrainingObjective,
)
from tunesmith.pipeline.heaviest import heaviest_of
from tunesmith.pipeline.judging import chosen_metrics, label_renderer, refuse_settings_of_writing, with_labels
from tunesmith.pipeline.locating import Location
from tunesmith.pipeline.own_answers import Base, are_made, replays_itself, with_own_answers
from tunesmith.pipeline.own_metrics import NO_METRICS, OwnMetrics
from tunesmith.pipeline.policy import (
    policy_metrics,
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
from tunesmith.recipe_limits import DAMAGE
from tunesmith.resolved import Plan, Resolved, Workload
from tunesmith.train.near_base import REPLAYED, base_is_kept, refuse_unreachable_base
from tunesmith.train.parallel import world_size

ASSUMED_ROWS, ASSUMED_TOKENS = 1000, 512
CHARACTERS_PER_TOKEN = 4


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
    location, config = start.base, _config(recipe, start)
    objective: TrainingObjective = recipe.objective
    limit = position_limit(config)
    tokenizer = load_tokenizer(
        start.tokenizer, recipe.model.revision, config, writes=not isinstance(objective, TaskObjective)
    )
    config = merged_config(config, start, tokenizer)
    added = add_tokens(tokenizer, recipe.model.add_tokens)
    model = _architecture(recipe, config, location)
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
    given = _given(recipe, prepared, workload, _judged(recipe, prepared, objective), teacher)
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


def _config(recipe: Recipe, start: Location) -> PreTrainedConfig:
    read = read_plain_config if recipe.budget.memory is not None and may_stream(recipe) else read_config
    return read(start.base, start.revision or recipe.model.revision)


def _architecture(recipe: Recipe, config: PreTrainedConfig, location: str) -> nn.Module:
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


def estimate_job(recipe: Recipe, progress: Progress = silent) -> Planned:
    """A plan from whatever is there: without a tokenizer or data, tokens are estimated and marked so.

    Raises:
        InputError: when the model's configuration cannot be read, or data that is there is wrong.
    """
    start = start_of(recipe, progress)
    if replays_itself(recipe.data):
        return _without_own_answers(recipe, start, progress)
    missing = [source.path for source in source_specs(recipe.data) if not _is_here(source.path)]
    if not missing and _has_tokenizer(start.tokenizer):
        return plan_job(recipe, progress)
    location, config = start.base, _config(recipe, start)
    model = _architecture(recipe, config, location)
    first = vocabulary_rows(model)  # the tokenizer, which would know, is not here
    teach_tokens(model, {token: first + at for at, token in enumerate(recipe.model.add_tokens)})
    workload = _estimated(recipe, position_limit(config), missing)
    if isinstance(recipe.objective, TaskObjective):
        metrics, why = chosen_metrics(recipe, recipe.objective)
    elif isinstance(recipe.objective, Policy):
        metrics, why = policy_metrics(recipe)
    else:
        metrics, why = choose_metrics(_asked(recipe), [], _own(recipe))
    judged = Judged(metrics, why if not missing else "there are no rows to look at", 0, 64)
    given = Given(workload, judged, workload.longest)
    plan = resolve(recipe, model, detect_hardware(), given)
    what = f"there is no {missing[0]}" if missing else "the model has no tokenizer"
    notes = [*plan.notes, f"tokens are estimated: {what}"]
    plan = with_start_told(plan.model_copy(update={"notes": notes}), recipe, start)
    planned = Planned(recipe, plan, location, config, detect_hardware(), None, None, None, recipe.objective)
    return replace(planned, given=given)


def _without_own_answers(recipe: Recipe, start: Location, progress: Progress) -> Planned:
    """A plan for rows that the base may still have to write: without them until they are there."""
    if _has_tokenizer(start.tokenizer):
        config = _config(recipe, start)
        tokenizer = load_tokenizer(start.tokenizer, recipe.model.revision, config)
        if are_made(recipe, Base.of(start, config, tokenizer)):
            return plan_job(recipe, progress)
    assert recipe.data.replay is not None
    data = recipe.data.model_copy(update={"replay": None})
    without = recipe.model_copy(update={"data": data, "train": recipe.train.model_copy(update={"kl_on": "targets"})})
    planned = estimate_job(without, progress)
    share = recipe.data.replay.share
    note = (
        f"without replay: the base first answers up to {recipe.data.replay.answers} prompts, and then an epoch has "
        f"{share / (1 - share):.0%} more rows"
    )
    return planned.with_plan(planned.plan.model_copy(update={"notes": [*planned.plan.notes, note]}))


def _guessed_head(objective: TrainingObjective) -> TaskHead | None:
    """The head that an objective asks for, with two labels where nobody knows them yet."""
    if not isinstance(objective, TaskObjective):
        return None
    known = getattr(objective, "labels", ())
    return TaskHead("token" if objective.words else "sequence", ("", " ") if known == "auto" else tuple(known) or ("",))


def _is_here(path: str) -> bool:
    return path == STANDARD_INPUT or path in PRESETS or Path(path).expanduser().exists()


def _has_tokenizer(location: str) -> bool:
    directory = Path(location)
    if not directory.is_dir():
        return True
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


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


def _estimated(recipe: Recipe, limit: int, missing: list[str]) -> Workload:
    asked = recipe.data.max_length
    longest = min(limit, ASSUMED_TOKENS if asked == "auto" else asked)
    if missing:
        return Workload(
            rows=ASSUMED_ROWS,
            epoch_rows=ASSUMED_ROWS,
            tokens=ASSUMED_ROWS * longest // 2,
            targets=ASSUMED_ROWS * longest // 4,
            longest=longest,
            estimated=True,
        )
    from tunesmith.data.read import open_records
    from tunesmith.data.record import RowErrors

    errors = RowErrors()
    sizes = [
        len(json.dumps(record.fields, ensure_ascii=False, default=str)) // CHARACTERS_PER_TOKEN + 1
        for reading, role in readings(recipe.data)
        if role in ("train", "replay")
        for record in open_records(reading, errors)
    ]
    errors.raise_any()
    longest = min(limit, max(sizes) if asked == "auto" else asked)
    tokens = sum(min(size, longest) for size in sizes)
    return Workload(
        rows=len(sizes),
        epoch_rows=len(sizes),
        tokens=tokens,
        targets=tokens // 2,
        longest=longest,
        estimated=True,
    )


def _asked(recipe: Recipe) -> list[str] | str:
    """The recipe's metrics, and those that its gate needs."""
    if recipe.evaluate == "off":
        return "auto"
    return recipe.evaluate.metric_names


def _own(recipe: Recipe) -> list[str]:
    return [] if recipe.evaluate == "off" else [metric.name for metric in recipe.evaluate.own_metrics]


def _judged(recipe: Recipe, prepared: Prepared, objective: TrainingObjective) -> Judged:
    count = 0 if recipe.evaluate == "off" else min(recipe.evaluate.rows, len(prepared.test))
    if isinstance(objective, TaskObjective):
        return Judged(*chosen_metrics(recipe, objective), count, 0, writes=False)
    if isinstance(objective, Policy):
        return Judged(*policy_metrics(recipe), count, 0, limit=objective.max_new_tokens)
    if isinstance(objective, Pretrain):
        return Judged(*_metrics_of_documents(recipe), count, 0, writes=False)
    rows = prepared.test or prepared.train
    references = [row.row.references[0] for row in rows if row.row.messages]
    asked = _asked(recipe)
    own = _own(recipe)
    if isinstance(objective, Preference) and asked == "auto":
        names = _metrics_of_preferences(objective)
        metrics, why = choose_metrics(names, references)[0], "what preferences are judged by"
    else:
        metrics, why = choose_metrics(asked, references, own)
    gated = [name for name in recipe.gate if name not in (*metrics, *DAMAGE)]
    if gated:
        try:
            metrics, _ = choose_metrics([*metrics, *gated], references, own)
        except InputError as error:
            raise InputError(error.what, where=f"gate.{gated[0]}", fix=error.fix) from error
    if not references and (generated := [name for name in metrics if name not in LIKELIHOODS]):
        raise InputError(
            f"{generated[0]} needs prompts and answers; these rows are raw text",
            where="evaluate.metrics",
            fix="use perplexity, or split the rows with data.answer_after",
        )
    answers = [len(row.example) - len(row.prompt_ids) for row in rows if row.prompt_ids]
    average = sum(answers) / max(1, len(answers))
    return Judged(metrics, why, count, max(answers, default=0), answer=average)


def _metrics_of_preferences(objective: Preference) -> list[str]:
    """Which answer gained more decides where the objective is about that, else which is likelier."""
    if not isinstance(objective, Pairwise):
        return [MARGIN]
    accuracies = [PREFERENCE_ACCURACY, REWARD_ACCURACY]
    return [*(reversed(accuracies) if objective.uses_reference else accuracies), MARGIN]


def _metrics_of_documents(recipe: Recipe) -> tuple[list[str], str]:
    """What documents are judged by, the deciding metric first, and why; settings about answers are refused."""
    answers = "documents have no answers"
    if recipe.train.generate_every != "off":
        raise InputError(answers, where="train.generate_every", fix="remove it")
    if recipe.evaluate == "off":
        return [*OF_DOCUMENTS], "the rows are documents"
    if recipe.evaluate.max_new_tokens != "auto":
        raise InputError(answers, where="evaluate.max_new_tokens", fix="remove it")
    asked = recipe.evaluate.metric_names
    for where, names in (("evaluate.metrics", [] if asked == "auto" else asked), ("gate", [*recipe.gate])):
        for name in names:
            if name not in (*OF_DOCUMENTS, *DAMAGE):
                raise InputError(f"{name} needs answers, and {answers}", where=where, fix="use perplexity")
    metrics = [*asked] if isinstance(asked, list) else []
    why = "as the recipe says" if metrics else "the rows are documents"
    return list(dict.fromkeys([*metrics, *OF_DOCUMENTS])), why
