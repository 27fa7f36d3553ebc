"""The models that the ladder asks: the recipe's own, and the tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tunesmith.base import InputError
from tunesmith.data.prepare import prepare
from tunesmith.data.render import Rendered, Renderer
from tunesmith.models.embeddings import cover_tokens
from tunesmith.models.load import load_model, load_tokenizer, read_config, stop_token_ids
from tunesmith.models.measure import position_limit
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import Speaker, load
from tunesmith.pipeline.locating import Location, locate
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.work import Watcher
from tunesmith.plan.hardware import DTYPES
from tunesmith.recipe import Recipe


def base_speaker(planned: Planned, watcher: Watcher) -> Speaker:
    """The model as the recipe names it, before any training."""
    assert planned.tokenizer is not None and isinstance(planned.renderer, Renderer)
    spec, dtype = planned.recipe.model, planned.plan.frozen_dtype
    watcher.progress("loading the model", 0, None)
    if planned.start is not None:
        model = load(spec.path, dtype=dtype, progress=watcher.progress)
    else:
        model = load_model(
            planned.location,
            dtype=DTYPES[dtype],
            device=planned.hardware.device,
            revision=spec.revision,
            quantized=spec.quantization,
        )
    cover_tokens(model, planned.tokenizer)
    location = Location(planned.location, None, planned.location, None)
    return Speaker(model, planned.tokenizer, planned.renderer, location)


def tuned_speaker(run: Path, planned: Planned, watcher: Watcher) -> Speaker:
    """The result of a run, which reads prompts by the template that it was trained with."""
    location = locate(str(run), watcher.progress)
    model = load(run, dtype=planned.plan.frozen_dtype, progress=watcher.progress)
    tokenizer = load_tokenizer(location.tokenizer)
    cover_tokens(model, tokenizer)
    data = planned.recipe.data if location.recipe is None else location.recipe.data
    renderer = Renderer.of(data, tokenizer, stop_token_ids(tokenizer, cast(Any, model).config, location.base))
    return Speaker(model, tokenizer, renderer, location)


def tuned_run(named: str, recipe: Recipe, directory: Path, watcher: Watcher) -> Path:
    """The run to measure: the one that is named, or the recipe's own, trained now or gone on with.

    Args:
        directory: of the recipe's own.
    """
    if named != "train":
        return Path(named).expanduser()
    run = finetune(recipe.model_copy(update={"output": str(directory)}), resume=True, watcher=watcher)
    return run.path


def refuse_seen_rows(named: str, planned: Planned, rows: list[Rendered], watcher: Watcher) -> None:
    """Refuses a run that was trained on what it would be judged by.

    Raises:
        InputError: naming the first such row, or when there is no run with a result.
    """
    where = "ladder.tuned"
    location = locate(named, watcher.progress)
    if location.recipe is None or location.run is None:
        raise InputError(
            "this is no run, so nobody can tell what it was trained on", where=where, fix="name a run, or train"
        )
    if location.head is not None:
        raise InputError("this model judges and writes nothing", where=where, fix="name a run that writes")
    theirs, own = location.recipe, planned.recipe
    same = theirs.data == own.data and theirs.seed == own.seed and theirs.evaluate != "off"
    if same:
        return
    tokenizer = load_tokenizer(location.tokenizer)
    renderer = Renderer.of(theirs.data, tokenizer, set(planned.prepared.stop_ids if planned.prepared else ()))
    prepared = prepare(
        theirs.data,
        renderer,
        model_limit=position_limit(read_config(location.base)),
        seed=theirs.seed,
        wants_test=theirs.evaluate != "off",
        progress=watcher.progress,
    )
    judged = {row.row.prompt_key: row.row for row in rows}
    for row in prepared.train.sources():
        if row.prompt_key in judged:
            raise InputError(
                f"{named} was trained on {row.source}, the same prompt as {judged[row.prompt_key].source}, which is a "
                "held-out row here",
                where=where,
                fix="give this recipe the run's own data and seed, or train",
            )
