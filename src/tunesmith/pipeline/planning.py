"""Everything that can be known before a weight is loaded: data, plan, and what the evaluation will be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.presets import PRESETS
from tunesmith.data.read import STANDARD_INPUT
from tunesmith.data.render import Renderer
from tunesmith.data.sources import readings, source_specs
from tunesmith.evaluation.compare import choose_metrics
from tunesmith.models.load import load_tokenizer, locate_model, read_config, read_plain_config, stop_token_ids
from tunesmith.models.measure import meta_model, position_limit
from tunesmith.models.streamed import StreamedModel, streaming_obstacle
from tunesmith.plan.hardware import Hardware, detect_hardware
from tunesmith.plan.resolve import Judged, resolve
from tunesmith.plan.streaming import may_stream
from tunesmith.recipe import Plan, Recipe, Resolved, Workload
from tunesmith.train.parallel import world_size

ASSUMED_ROWS, ASSUMED_TOKENS = 1000, 512
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Planned:
    """A job that is ready to start.

    Attributes:
        location: directory or hub id of the model.
        prepared: the data; None when the plan was made without it.
    """

    recipe: Recipe
    plan: Plan
    location: str
    config: PreTrainedConfig
    hardware: Hardware
    tokenizer: PreTrainedTokenizerBase | None
    renderer: Renderer | None
    prepared: Prepared | None

    def with_plan(self, plan: Plan) -> Planned:
        return Planned(
            self.recipe, plan, self.location, self.config, self.hardware, self.tokenizer, self.renderer, self.prepared
        )


def plan_job(recipe: Recipe, progress: Progress = silent) -> Planned:
    """Reads and renders the data and makes the plan that `finetune` executes.

    Raises:
        InputError: for anything wrong with model, data or settings.
    """
    location = locate_model(recipe.model.path, progress)
    config = _config(recipe, location)
    model = _architecture(recipe, config, location)
    tokenizer = load_tokenizer(location, recipe.model.revision, config)
    renderer = Renderer.of(recipe.data, tokenizer, stop_token_ids(tokenizer, config, location))
    limit = position_limit(config)
    prepared = prepare(
        recipe.data,
        renderer,
        model_limit=limit,
        seed=recipe.seed,
        wants_test=recipe.evaluate != "off",
        progress=progress,
        alone=recipe.budget.memory is not None,
    )
    workload = _counted(prepared)
    hardware = detect_hardware()
    judged = _judged(recipe, prepared)
    plan = resolve(recipe, model, workload, hardware, judged, prepared.max_length)
    found = [*plan.resolved, *_found_in_data(recipe, prepared)]
    notes = [*plan.notes, *prepared.notes]
    if recipe.train.shard and world_size() == 1:
        notes.append("train.shard spreads nothing over one process; torchrun starts several")
    plan = plan.model_copy(update={"notes": notes, "resolved": found})
    return Planned(recipe, plan, location, config, hardware, tokenizer, renderer, prepared)


def _config(recipe: Recipe, location: str) -> PreTrainedConfig:
    read = read_plain_config if recipe.budget.memory is not None and may_stream(recipe) else read_config
    return read(location, recipe.model.revision)


def _architecture(recipe: Recipe, config: PreTrainedConfig, location: str) -> nn.Module:
    """The modules without weights; under a memory budget without transformers' own, which take memory to import."""
    if recipe.budget.memory is not None and may_stream(recipe) and streaming_obstacle(config) is None:
        return StreamedModel(config)
    return meta_model(config, location)


def _found_in_data(recipe: Recipe, prepared: Prepared) -> list[Resolved]:
    """What `auto` became by looking at the files themselves."""
    found = []
    declared = {source.path: source.format for source in source_specs(recipe.data)}
    for source in prepared.sources:
        if declared.get(source["path"], recipe.data.format) == "auto":
            reason = f"the columns of {source['path']}"
            found.append(Resolved(name="data.format", value=source["format"], reason=reason))
    if recipe.data.template == "auto":
        found.append(Resolved(name="data.template", value=prepared.template, reason="what the model was made for"))
    if recipe.data.test == "auto" and prepared.test:
        found.append(Resolved(name="data.test", value=f"{len(prepared.test)} rows", reason=prepared.test_from))
    return found


def estimate_job(recipe: Recipe, progress: Progress = silent) -> Planned:
    """A plan from whatever is there: without a tokenizer or data, tokens are estimated and marked so.

    Raises:
        InputError: when the model's configuration cannot be read, or data that is there is wrong.
    """
    location = locate_model(recipe.model.path, progress)
    missing = [source.path for source in source_specs(recipe.data) if not _is_here(source.path)]
    if not missing and _has_tokenizer(location):
        return plan_job(recipe, progress)
    config = _config(recipe, location)
    model = _architecture(recipe, config, location)
    workload = _estimated(recipe, position_limit(config), missing)
    metrics, why = choose_metrics(_asked(recipe), [])
    judged = Judged(metrics, why if not missing else "there are no rows to look at", 0, 64)
    plan = resolve(recipe, model, workload, detect_hardware(), judged, workload.longest)
    what = f"there is no {missing[0]}" if missing else "the model has no tokenizer"
    notes = [*plan.notes, f"tokens are estimated: {what}"]
    return Planned(
        recipe, plan.model_copy(update={"notes": notes}), location, config, detect_hardware(), None, None, None
    )


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
    return recipe.evaluate.metrics


def _judged(recipe: Recipe, prepared: Prepared) -> Judged:
    rows = prepared.test or prepared.train
    references = [row.row.references[0] for row in rows if row.row.messages]
    metrics, why = choose_metrics(_asked(recipe), references)
    gated = [name for name in recipe.gate if name not in (*metrics, "forgetting")]
    if gated:
        try:
            metrics, _ = choose_metrics([*metrics, *gated], references)
        except InputError as error:
            raise InputError(error.what, where=f"gate.{gated[0]}", fix=error.fix) from error
    if not references and (generated := [name for name in metrics if name != "perplexity"]):
        raise InputError(
            f"{generated[0]} needs prompts and answers; these rows are raw text",
            where="evaluate.metrics",
            fix="use perplexity, or split the rows with data.answer_after",
        )
    answers = [len(row.example) - len(row.prompt_ids) for row in rows if row.prompt_ids]
    count = 0 if recipe.evaluate == "off" else min(recipe.evaluate.rows, len(prepared.test))
    return Judged(metrics, why, count, max(answers, default=0))
