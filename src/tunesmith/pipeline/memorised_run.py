"""The memorisation probe of a run that is done, with as many rows as are wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.base import InputError, Progress, silent
from tunesmith.evaluation.answers import Evaluation
from tunesmith.pipeline.loaded import base_of, load_speaker
from tunesmith.pipeline.locating import locate
from tunesmith.pipeline.memorisation import FEWEST, Probe, not_measured, probe_of
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.proof import Proof
from tunesmith.recipe import EvaluateSpec, MemorisationSpec


def memorisation_of_run(target: str, rows: int, progress: Progress = silent) -> dict[str, Any]:
    """Asks a run's model and its base for the answers of training rows, read as its recipe says.

    Args:
        target: a run, or several of one recipe, of which it is the last.
        rows: training rows drawn at random; at most as many more with details, and twice as many held-out ones.

    Returns:
        As `memorisation` of a report.

    Raises:
        InputError: when this is no run, its data cannot be read any more, or its kind of job cannot show it.
    """
    location = locate(target, progress)
    if location.recipe is None or location.run is None:
        raise InputError(
            "only a run knows what it was trained on",
            where=target,
            fix="name a run's directory, or leave out --memorisation",
        )
    planned = plan_job(location.recipe, progress)
    given = location.recipe.evaluate
    spec = (EvaluateSpec() if given == "off" else given).model_copy(update={"memorisation": "off"})
    proof = Proof(planned, spec)
    how = replace(proof.how, generates=False, max_new_tokens=max(FEWEST, proof.how.max_new_tokens))
    asked = spec.model_copy(update={"memorisation": MemorisationSpec(rows=rows)})
    probe = probe_of(planned, asked, proof.rows[: 2 * rows], how)
    if not isinstance(probe, Probe):
        return not_measured(probe, asked=True)
    speaker = load_speaker(target, progress=progress)
    tuned: Evaluation = {"rows": [], "memorisation": probe.ask(speaker.model, progress)}
    del speaker  # or two models would be in memory
    base_model = load_speaker(base_of(location), progress=progress, like=location).model
    base: Evaluation = {"rows": [], "memorisation": probe.ask(base_model, progress)}
    return probe.summary(base, tuned, spec.confidence)
