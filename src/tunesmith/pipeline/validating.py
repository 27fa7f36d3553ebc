"""What is measured between steps: the loss on validation rows, and answers to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tunesmith.base import Interrupted, silent
from tunesmith.evaluation.answers import Judging, judge, mean_nll
from tunesmith.evaluation.compare import REWARD, metric_rows
from tunesmith.models.sharding import whole
from tunesmith.pipeline.rewards import judge_and_score
from tunesmith.pipeline.stopping import Stopping
from tunesmith.pipeline.usage import Stopwatch
from tunesmith.pipeline.work import Work
from tunesmith.train.loop import Emit
from tunesmith.train.parallel import is_main, world_size


def validation(work: Work, emit: Emit) -> Callable[[int], float | None]:
    """Validation loss and, when the recipe asks for it, generated answers, on the main process."""
    planned = work.planned
    assert planned.prepared is not None and planned.tokenizer is not None
    rows, plan, tokenizer = planned.prepared.validation, planned.plan, planned.tokenizer
    every = planned.recipe.train.generate_every
    stop_ids = frozenset(planned.prepared.stop_ids)
    # Several processes end together, after the evaluation that the others wait for.
    watched = partial(_stop_when_asked, work.stopping) if world_size() == 1 else silent

    def measured(step: int) -> float | None:
        # Told when everything is measured: a stop on the way must leave no event of what is measured again.
        loss, told = None, list[dict[str, Any]]()
        watch = Stopwatch()
        validates = plan.evaluate_every is not None and (step % plan.evaluate_every == 0 or step == plan.steps)
        generates = every != "off" and step % every == 0
        if validates and planned.score is None:
            examples, objective = [row.example for row in rows], planned.objective
            loss = mean_nll(work.model, examples, packed=plan.packing, progress=watched, objective=objective)
        if generates or (validates and planned.score is not None):
            how = Judging(plan.max_new_tokens, 16, stop_ids, plan.packing)
            if planned.score is None:
                judged = judge(work.model, tokenizer, rows, how, watched)
            else:
                judged = judge_and_score(work.model, tokenizer, rows, how, planned.score, watched)
            judged = planned.own.scored(judged)
            scores = {name: found.corpus() for name in plan.metrics if (found := metric_rows(name, judged)) is not None}
            if validates and planned.score is not None:  # the more reward, the better
                loss = 0.0 - scores[REWARD]
            told.append({"event": "answers", "step": step, "metrics": scores, "seconds": watch.seconds})
        if loss is not None and validates:
            value = loss if loss - loss == 0.0 else None
            told.insert(0, {"event": "validation", "step": step, "loss": value, "seconds": watch.seconds})
        for event in told:
            emit(event)
        return loss

    def evaluate(step: int) -> float | None:
        with whole(work.model):
            return measured(step) if is_main() and rows else None

    return evaluate


def _stop_when_asked(stopping: Stopping, label: str, done: int, total: int | None) -> None:
    if stopping.asked():
        raise Interrupted("stopped while evaluating")
