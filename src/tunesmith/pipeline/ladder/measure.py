"""`tunesmith advise --measure`: prompting, retrieval and tuning on the same held-out rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.base import InputError, Interrupted
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.row import Row
from tunesmith.evaluation.answers import chosen_rows
from tunesmith.evaluation.compare import LIKELIHOODS, better_way
from tunesmith.files import write_json, write_text
from tunesmith.pages.ladder import ladder_page
from tunesmith.pipeline.ladder.asking import Store
from tunesmith.pipeline.ladder.climb import Climb
from tunesmith.pipeline.ladder.examples import Examples
from tunesmith.pipeline.ladder.facts import probe_facts
from tunesmith.pipeline.ladder.job import Job
from tunesmith.pipeline.ladder.models import base_speaker, refuse_seen_rows, tuned_run, tuned_speaker
from tunesmith.pipeline.ladder.scores import TUNED, Scoring, decided
from tunesmith.pipeline.planning import Planned, plan_job
from tunesmith.pipeline.retrieving import Indexes
from tunesmith.pipeline.work import Watcher
from tunesmith.plan.advise.cost import Prices, read_prices
from tunesmith.recipe import EvaluateSpec, Recipe
from tunesmith.recipe_file import LADDER, plain_yaml, recipe_yaml
from tunesmith.recipe_ladder import RUNGS, LadderSpec
from tunesmith.run import PAGE, Run

ASKED, LADDER_REPORT = "ladder.yaml", "ladder.json"
"""What was asked, and what came of it."""
SERVING = "The prices have no section serving: those that come with Tunesmith are used for it."


def measure_ladder(spec: LadderSpec, recipe: Recipe, watcher: Watcher) -> dict[str, Any]:
    """Measures every rung that is asked for and writes `ladder.json` and `report.html` into `spec.output`.

    Answers that stand there already are not asked for again, whatever else of the settings has changed.

    Raises:
        InputError: for anything wrong with recipe, rows, corpus or run.
        Interrupted: after Ctrl-C; the same command goes on.
    """
    prices = read_prices(None if spec.prices is None else Path(spec.prices))
    planned = plan_job(recipe, watcher.progress)
    evaluate = _refuse_unfit(recipe, planned)
    directory = Path(spec.output)
    _open(directory, recipe, spec)
    with Run(directory).locked():
        indexes = Indexes("" if spec.encoder == "off" else spec.encoder, planned.hardware.device, watcher.progress)
        job = Job(spec, recipe, evaluate, planned, directory, Store.within(directory), indexes, watcher)
        if spec.reads_with_encoder:
            _ = indexes.loaded_encoder  # an encoder that cannot be had is told before anything takes long
        try:
            report = _measured(job, prices)
        except Interrupted as error:
            raise Interrupted(error.what, where=error.where, fix="give the same command again") from error
        write_text(directory / PAGE, ladder_page(report))
        write_json(directory / LADDER_REPORT, report)
    return report


def _open(directory: Path, recipe: Recipe, spec: LadderSpec) -> None:
    """Makes the directory, or goes on in one that a ladder was measured in before."""
    if not (directory / ASKED).is_file():
        Run.refuse_occupied(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        asked = {**recipe.model_dump(mode="json"), LADDER: spec.model_dump(mode="json")}
        write_text(directory / ASKED, plain_yaml(asked))
    except OSError as error:
        raise InputError(
            f"the directory cannot be written: {error.strerror}", where=directory, fix="name another with --output"
        ) from error


def _measured(job: Job, prices: Prices) -> dict[str, Any]:
    spec, planned, evaluate = job.spec, job.planned, job.evaluate
    prepared = planned.prepared
    assert prepared is not None
    serving = prices.serving or read_prices().serving
    assert serving is not None
    library = cache(job.corpus)
    notes = [] if prices.serving is not None else [SERVING]
    report: dict[str, Any] = {"rungs": [], "facts": None}
    if any(spec.runs(name) for name in RUNGS):
        rows = chosen_rows(prepared.test, spec.rows or evaluate.rows, job.recipe.seed)
        held = [row.row for row in rows]
        metrics = [name for name in planned.plan.metrics if name not in LIKELIHOODS]
        scoring = Scoring(metrics, evaluate, job.recipe.seed, serving, planned.own)
        limit, chooses = planned.plan.max_new_tokens, bool(prepared.validation)
        climb = Climb(spec, held, limit, scoring, _examples(job), library, chooses)
        _climb(job, climb, rows)
        entries = scoring.entries(held, climb.measured)
        report |= {
            "metric": metrics[0],
            "better": better_way(metrics[0]),
            "target": spec.target,
            "rows": len(held),
            "test_from": prepared.test_from,
            "rungs": entries,
            "answer": decided(entries, metrics[0], spec.target),
        }
        notes += _notes(entries)
    if spec.facts is not None:
        report["facts"] = probe_facts(job, library())
    return {
        **report,
        "model": job.recipe.model.path,
        "prices": prices.model_copy(update={"serving": serving}).model_dump(),
        "confidence": evaluate.confidence,
        "notes": notes,
        "settings": spec.model_dump(mode="json"),
        "recipe": recipe_yaml(job.recipe),
        "directory": str(job.directory),
    }


def _climb(job: Job, climb: Climb, rows: list[Rendered]) -> None:
    """Asks the base, then the tuned model; only one of them is in memory."""
    spec = job.spec
    tuned = any(spec.runs(name) for name in TUNED)
    if tuned and spec.tuned != "train":
        refuse_seen_rows(spec.tuned, job.planned, rows, job.watcher)
    if any(spec.runs(name) for name in RUNGS if name not in TUNED):
        climb.measure(job.asker(base_speaker(job.planned, job.watcher)), tuned=False)
        gc.collect()
    if tuned:
        run = tuned_run(spec.tuned, job.recipe, job.directory / "tuned", job.watcher)
        climb.measure(job.asker(tuned_speaker(run, job.planned, job.watcher)), tuned=True)
        gc.collect()


def _examples(job: Job) -> Callable[[], Examples]:
    """The rows that may be examples, and those that their number is chosen by."""

    @cache
    def made() -> Examples:
        prepared, spec = job.planned.prepared, job.spec
        assert prepared is not None
        train: list[Row] = [row for row in prepared.train.sources() if row.messages]
        if prepared.validation:
            chosen = [row.row for row in chosen_rows(prepared.validation, spec.shots_rows, job.recipe.seed)]
            return Examples(spec, train, chosen, f"{len(chosen)} validation rows", job.indexes)
        drawn = chosen_rows(prepared.train, min(spec.shots_rows, len(train) // 2), job.recipe.seed)
        taken = {row.row.prompt_key for row in drawn}
        pool = [row for row in train if row.prompt_key not in taken]
        where = f"{len(drawn)} training rows, which are no examples"
        return Examples(spec, pool, [row.row for row in drawn], where, job.indexes)

    return made


def _refuse_unfit(recipe: Recipe, planned: Planned) -> EvaluateSpec:
    """The recipe's evaluation, where its rows are questions with answers."""
    if recipe.evaluate == "off":
        raise InputError("the ladder is measured as evaluate says", where="evaluate", fix="remove evaluate: off")
    if not isinstance(planned.renderer, Renderer):
        raise InputError(
            f"the ladder compares answers, and {recipe.objective.kind} is not trained on any",
            where="objective.kind",
            fix="use sft",
        )
    if not any(name not in LIKELIHOODS for name in planned.plan.metrics):
        raise InputError(
            f"the ladder compares answers, and {planned.plan.metrics[0]} looks at none",
            where="evaluate.metrics",
            fix="name a metric of answers, such as exact_match or rougeL",
        )
    return recipe.evaluate


def _notes(entries: list[dict[str, Any]]) -> list[str]:
    notes = []
    for entry in entries:
        name, rows = entry["name"], entry["rows"]
        if count := entry["did_not_fit"]:
            notes.append(f"{name}: {count} of {rows} prompts did not fit into the model and count as wrong")
        if count := entry["without_answer"]:
            notes.append(f"{name}: no answer was found in {count} of {rows} texts, which count as wrong")
        if (count := entry["cut_off"]) > rows // 4:
            notes.append(f"{name}: {count} of {rows} texts were cut off at their longest length")
    return notes
