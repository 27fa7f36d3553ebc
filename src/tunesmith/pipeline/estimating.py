"""A plan for a job whose data or tokenizer are not here yet: tokens are estimated, and marked so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tunesmith.base import Progress, silent
from tunesmith.data.presets import PRESETS
from tunesmith.data.read import STANDARD_INPUT, open_records
from tunesmith.data.record import RowErrors
from tunesmith.data.sources import readings, source_specs
from tunesmith.evaluation.compare import choose_metrics
from tunesmith.models.embeddings import teach_tokens, vocabulary_rows
from tunesmith.models.load import load_tokenizer
from tunesmith.models.measure import position_limit
from tunesmith.objectives import Policy, TaskObjective
from tunesmith.pipeline.choosing_metrics import asked_metrics, own_names
from tunesmith.pipeline.judging import chosen_metrics
from tunesmith.pipeline.locating import Location
from tunesmith.pipeline.own_answers import Base, are_made, replays_itself
from tunesmith.pipeline.planning import Planned, architecture_of, config_of, plan_job
from tunesmith.pipeline.policy import policy_metrics
from tunesmith.pipeline.starting import start_of, with_start_told
from tunesmith.plan.given import Given, Judged
from tunesmith.plan.hardware import detect_hardware
from tunesmith.plan.resolve import resolve
from tunesmith.recipe import Recipe
from tunesmith.resolved import Workload

ASSUMED_ROWS, ASSUMED_TOKENS = 1000, 512
CHARACTERS_PER_TOKEN = 4


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
    location, config = start.base, config_of(recipe, start)
    model = architecture_of(recipe, config, location)
    first = vocabulary_rows(model)  # the tokenizer, which would know, is not here
    teach_tokens(model, {token: first + at for at, token in enumerate(recipe.model.add_tokens)})
    workload = _estimated(recipe, position_limit(config), missing)
    if isinstance(recipe.objective, TaskObjective):
        metrics, why = chosen_metrics(recipe, recipe.objective)
    elif isinstance(recipe.objective, Policy):
        metrics, why = policy_metrics(recipe)
    else:
        metrics, why = choose_metrics(asked_metrics(recipe), [], own_names(recipe))
    if asked_metrics(recipe) == "auto":
        why = "there are no rows to look at" if missing else "the rows are not rendered"
    judged = Judged(metrics, why, 0, 64)
    given = Given(workload, judged, workload.longest)
    plan = resolve(recipe, model, detect_hardware(), given)
    what = f"there is no {missing[0]}" if missing else "the model has no tokenizer"
    uncounted = "" if recipe.evaluate == "off" else ", and the evaluation is not counted"
    notes = [*plan.notes, f"tokens are estimated{uncounted}: {what}"]
    plan = with_start_told(plan.model_copy(update={"notes": notes}), recipe, start)
    planned = Planned(recipe, plan, location, config, detect_hardware(), None, None, None, recipe.objective)
    return replace(planned, given=given)


def _without_own_answers(recipe: Recipe, start: Location, progress: Progress) -> Planned:
    """A plan for rows that the base may still have to write: without them until they are there."""
    if _has_tokenizer(start.tokenizer):
        config = config_of(recipe, start)
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


def _is_here(path: str) -> bool:
    return path == STANDARD_INPUT or path in PRESETS or Path(path).expanduser().exists()


def _has_tokenizer(location: str) -> bool:
    directory = Path(location)
    if not directory.is_dir():
        return True
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


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
