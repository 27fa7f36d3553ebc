"""Models by any name a user has for them: a directory, a hub id, an adapter, a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.batch import Batch, pack
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.record import RowErrors
from tunesmith.data.render import Renderer
from tunesmith.data.render_documents import DocumentRenderer
from tunesmith.data.render_pairs import PairRenderer, holds_pairs, over_last_answers
from tunesmith.data.rows import open_rows
from tunesmith.data.sources import held_out_spec, readings
from tunesmith.data.spec import DataSpec
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.evaluation.answers import Judged, Judging, chosen_rows, judge
from tunesmith.evaluation.compare import (
    LIKELIHOODS,
    choose_metrics,
    compare_metrics,
    metric_rows,
)
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.quantized_lora import base_read
from tunesmith.metrics import CALIBRATION_ERROR, MARGIN, OF_DOCUMENTS, PREFERENCE_ACCURACY, bootstrap
from tunesmith.models.embeddings import cover_tokens
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.load import (
    Loading,
    load_judge,
    load_model,
    load_tokenizer,
    read_config,
    stop_token_ids,
)
from tunesmith.models.measure import position_limit
from tunesmith.models.quantized import Quantization
from tunesmith.models.task_head import head_of
from tunesmith.models.templates import resolve_template
from tunesmith.objectives import Pretrain
from tunesmith.pipeline.labeller import Labeller
from tunesmith.pipeline.locating import Location, base_of_run, locate
from tunesmith.pipeline.own_metrics import OwnMetrics
from tunesmith.plan.hardware import DTYPES, detect_hardware, native_dtypes
from tunesmith.recipe import EvaluateSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def default_dtype() -> torch.dtype:
    """bf16 where the device has it natively, else fp32."""
    return torch.bfloat16 if "bf16" in native_dtypes(detect_hardware().device) else torch.float32


def load(path: str | Path, *, dtype: str = "auto", progress: Progress = silent) -> PreTrainedModel:
    """Loads a model: a directory, a hub id, an adapter's directory, or a run's.

    Args:
        dtype: `fp32`, `bf16`, `fp16`, or `auto` for what the device computes natively.
    """
    return _load(locate(str(path), progress), dtype, progress)


def _load(location: Location, dtype: str, progress: Progress) -> PreTrainedModel:
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"unknown dtype {dtype!r}", fix="use auto, fp32, bf16 or fp16")
    progress("loading the model", 0, None)
    how = Loading(
        default_dtype() if dtype == "auto" else DTYPES[dtype],
        detect_hardware().device,
        location.revision,
        held_quantized(location),
    )
    if location.head is not None:
        model, *_ = load_judge(location.base, location.head, how)
    else:
        model = load_model(
            location.base, dtype=how.dtype, device=how.device, revision=how.revision, quantized=how.quantized
        )
    if location.adapter is not None:
        load_adapter(model, location.adapter)
    return model.eval()


def held_quantized(location: Location) -> Quantization | None:
    """How the base of an adapter is held: as its run says, or as the adapter needs it."""
    if location.adapter is None:
        return None
    if location.recipe is not None:
        return location.recipe.model.quantization
    base = base_read(location.adapter)
    return base.quantized if base.bound else None


@dataclass(frozen=True)
class Speaker:
    """A model that answers: what `generate`, `chat` and `evaluate` work with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    location: Location

    @property
    def of_documents(self) -> bool:
        """Whether it was pretrained on documents, and is judged by them."""
        return self.location.recipe is not None and isinstance(self.location.recipe.objective, Pretrain)

    def answer(
        self, conversations: Sequence[Sequence[dict[str, Any]]], sampling: Sampling, progress: Progress = silent
    ) -> list[Generation]:
        """Answers conversations that end with a user's turn."""
        prompts = [self.renderer.prompt_ids(messages) for messages in conversations]
        return generate(
            self.model, prompts, sampling, stop_ids=self.renderer.stop_ids, batch_size=16, progress=progress
        )

    def text(self, token_ids: Sequence[int]) -> str:
        return cast(str, self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load_speaker(
    path: str, *, dtype: str = "auto", progress: Progress = silent, like: Location | None = None
) -> Speaker:
    """Loads a model with its tokenizer and template.

    Args:
        like: take tokenizer, template and data settings from here instead; a base is asked as its adapter was trained.
    """
    location = locate(path, progress)
    if location.head is not None:
        raise InputError(
            "this model judges and writes nothing", where=path, fix="use tunesmith generate or evaluate, which ask it"
        )
    if like is not None:
        location = replace(location, tokenizer=like.tokenizer, recipe=like.recipe)
    tokenizer = load_tokenizer(location.tokenizer)
    plain = location.recipe is not None and location.recipe.data.template == "plain"
    template = resolve_template("plain" if plain else "auto", tokenizer)
    model = _load(location, dtype, progress)
    cover_tokens(model, tokenizer)
    return Speaker(model, tokenizer, renderer_for(location.base, model, tokenizer, template), location)


def load_labeller(path: str, *, dtype: str = "auto", progress: Progress = silent) -> Labeller | None:
    """Loads a model that judges, with its tokenizer; None where the model writes."""
    location = locate(path, progress)
    if location.head is None:
        return None
    model = _load(location, dtype, progress)
    return Labeller.of(model, head_of(model) or location.head, load_tokenizer(location.tokenizer, writes=False))


def renderer_for(base: str, model: Any, tokenizer: PreTrainedTokenizerBase, template: Any) -> Renderer:
    renderer = Renderer(template, tokenizer, "answers", stop_token_ids(tokenizer, model.config, base))
    renderer.learn_stop_ids()
    return renderer


def _speaker_of(model: nn.Module) -> Speaker:
    """A speaker for a model that is in memory already; its tokenizer is where its weights came from."""
    loaded = cast("PreTrainedModel", model)
    name = loaded.config.name_or_path
    if not name:
        raise InputError("the model does not say where it was loaded from", fix="load it with tunesmith.load")
    tokenizer = load_tokenizer(name)
    renderer = renderer_for(name, loaded, tokenizer, resolve_template("auto", tokenizer))
    return Speaker(loaded, tokenizer, renderer, Location(name, None, name, None))


def prepared_rows(speaker: Speaker, data: DataSpec, progress: Progress = silent) -> Prepared:
    """Reads and renders rows for a model that is loaded; nothing is held back."""
    limit = position_limit(read_config(speaker.location.base))
    return prepare(data, speaker.renderer, model_limit=limit, seed=0, wants_test=False, progress=progress)


def batches(
    model: nn.Module, data: str | Path | DataSpec, *, batch_size: int = 16, epochs: int = 1, micro_batch: int = 8
) -> list[list[Batch]]:
    """Windows of micro-batches for `step`: every row once an epoch, answers as targets.

    Args:
        model: from `load`; its own tokenizer and chat template are used.
        data: a file of any format Tunesmith reads, or a `DataSpec`.
        batch_size: rows per optimizer step.
        micro_batch: rows per forward pass.
    """
    spec = data if isinstance(data, DataSpec) else DataSpec(train=str(data))
    prepared = prepared_rows(_speaker_of(model), spec)
    layout = "packed" if packing_obstacle(model) is None else "padded"
    device = next(model.parameters()).device
    total = epochs * prepared.order.epoch_rows
    windows = []
    for start in range(0, total, batch_size):
        rows = [prepared.train[at].example for at in prepared.order.rows(start, min(start + batch_size, total))]
        windows.append(
            [pack(rows[at : at + micro_batch], layout).to(device) for at in range(0, len(rows), micro_batch)]
        )
    return windows


def evaluate(
    model: nn.Module,
    data: str | Path | DataSpec,
    spec: EvaluateSpec | None = None,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Answers held-out rows and scores them.

    Args:
        model: from `load`.
        data: a file of any format Tunesmith reads, or a `DataSpec` whose `train` names the rows.
        spec: rows, metrics and intervals; the defaults of a recipe otherwise.

    Returns:
        For every metric `value`, `low`, `high` and `n`.
    """
    given = data if isinstance(data, DataSpec) else DataSpec(train=str(data))
    spec = spec or EvaluateSpec()
    head = head_of(model)
    if head is not None:
        trained = cast("PreTrainedModel", model)
        labeller = Labeller.of(trained, head, load_tokenizer(str(trained.config.name_or_path), writes=False))
        judged, metrics = labeller.judged_rows(given, spec, progress)
    else:
        judged, metrics = judged_rows(_speaker_of(model), given, spec, progress)
    return {entry.pop("name"): entry for entry in scores(judged, metrics, spec)}


def compare_with_base(
    target: str, files: Sequence[DataSpec], spec: EvaluateSpec, progress: Progress = silent
) -> list[dict[str, Any]]:
    """Judges a model on every file; an adapter or run that writes is compared with its base on the same rows.

    Returns:
        For every file its `data` and `metrics`: as in a report where there is a base, else with `value`.
    """
    labeller = load_labeller(target, progress=progress)
    if labeller is not None:  # its base has no head, and nothing to say of these rows
        judged = [labeller.judged_rows(file, spec, progress) for file in files]
        return [
            {"data": file.train, "metrics": scores(rows, names, spec)}
            for file, (rows, names) in zip(files, judged, strict=True)
        ]
    location = locate(target, progress)
    compared = location.recipe is not None or location.adapter is not None
    judged = _judged_by(load_speaker(target, progress=progress), files, spec, progress)
    if not compared:
        return [
            {"data": file.train, "metrics": scores(rows, names, spec)}
            for file, (rows, names) in zip(files, judged, strict=True)
        ]
    base = load_speaker(base_of(location), progress=progress, like=location)
    before = _judged_by(base, files, spec, progress)
    results = []
    for file, (tuned_rows, names), (base_rows, _) in zip(files, judged, before, strict=True):
        metrics, warnings = compare_metrics(names, base_rows, tuned_rows, spec, 0)
        results.append({"data": file.train, "metrics": metrics, "warnings": warnings})
    return results


def _judged_by(
    speaker: Speaker, files: Sequence[DataSpec], spec: EvaluateSpec, progress: Progress
) -> list[tuple[list[Judged], list[str]]]:
    return [judged_rows(speaker, read_as_trained(speaker, file), spec, progress) for file in files]


def read_as_trained(speaker: Speaker, file: DataSpec) -> DataSpec:
    """A file of rows with the columns, template and system turn of the run that made the model, where one did."""
    recipe = speaker.location.recipe
    if recipe is None:
        return file
    own = {key: getattr(recipe.data, key) for key in ("answer_after", "system", "template")}
    like = held_out_spec(str(file.train), recipe.data)
    return file.model_copy(update={**own, "format": like.format, "columns": like.columns})


def base_of(location: Location) -> str:
    """Directory or hub id of what an adapter, or the model of a run, began as; of another model itself."""
    if location.run is None or location.recipe is None or location.adapter is not None:
        return location.base
    return base_of_run(location.run, location.recipe)


def judged_rows(
    speaker: Speaker, data: DataSpec, spec: EvaluateSpec, progress: Progress = silent
) -> tuple[list[Judged], list[str]]:
    """Every row as the model dealt with it, and the metrics that fit the rows."""
    data = data.model_copy(update={"duplicates": "keep", "test": "auto", "validation": None, "checks": False})
    if speaker.of_documents and open_rows(readings(data)[0][0], RowErrors()).format == "text":
        return judged_documents(speaker, data, spec, progress)
    asked: list[str] | str = spec.metric_names
    own = OwnMetrics.of(spec.own_metrics)
    if holds_pairs(data):
        limit = position_limit(read_config(speaker.location.base))
        pairs = PairRenderer(over_last_answers(speaker.renderer))
        found = prepare(data, pairs, model_limit=limit, seed=0, wants_test=False, progress=progress)
        asked = [PREFERENCE_ACCURACY, MARGIN] if asked == "auto" else asked
    else:
        found = prepared_rows(speaker, data, progress)
    rows = chosen_rows(found.train, spec.rows, 0)
    references = [row.row.references[0] for row in rows if row.row.messages]
    metrics, _ = choose_metrics(asked, references, [*own.of_row])
    longest = max((len(row.example) - len(row.prompt_ids) for row in rows if row.prompt_ids), default=0)
    limit = max(16, longest * 3 // 2) if spec.max_new_tokens == "auto" else spec.max_new_tokens
    how = Judging(
        limit,
        spec.batch_size,
        frozenset(speaker.renderer.stop_ids),
        packing_obstacle(speaker.model) is None,
        any(name not in LIKELIHOODS for name in metrics),
        confident=CALIBRATION_ERROR in metrics and not holds_pairs(data),
    )
    return own.scored(judge(speaker.model, speaker.tokenizer, rows, how, progress)), metrics


def judged_documents(
    speaker: Speaker, data: DataSpec, spec: EvaluateSpec, progress: Progress
) -> tuple[list[Judged], list[str]]:
    """As `judged_rows` for a model that was pretrained on documents, with the blocks of its run."""
    recipe = speaker.location.recipe
    renderer = DocumentRenderer.of(data, speaker.tokenizer, set(speaker.renderer.stop_ids))
    limit = position_limit(read_config(speaker.location.base))
    data = data.model_copy(update={"max_length": "auto" if recipe is None else recipe.data.max_length})
    held = data.model_copy(update={"validation": data.train, "overlap": "keep"})
    found = prepare(held, renderer, model_limit=limit, seed=0, wants_test=False, progress=progress)
    metrics: list[str] = [*OF_DOCUMENTS] if isinstance(spec.metrics, str) else list(spec.metric_names)
    if wrong := [name for name in metrics if name not in OF_DOCUMENTS]:
        raise InputError(f"{wrong[0]} needs answers, and documents have none", where="--metric", fix="use perplexity")
    packed = packing_obstacle(speaker.model) is None
    how = Judging(0, spec.batch_size, frozenset(), packed, generates=False)
    blocks = chosen_rows(found.validation, spec.rows, 0)
    return judge(speaker.model, speaker.tokenizer, blocks, how, progress), metrics


def scores(judged: Sequence[Judged], metrics: Sequence[str], spec: EvaluateSpec) -> list[dict[str, Any]]:
    """Every metric of one model with its interval."""
    found = []
    for name in metrics:
        rows = metric_rows(name, judged)
        if rows is not None:
            estimate = bootstrap(rows, resamples=spec.resamples, confidence=spec.confidence, seed=0)
            found.append(
                {"name": name, "value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
            )
    return found
