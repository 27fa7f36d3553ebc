"""Base and tuned model on the same held-out rows, and the report that comes of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

from torch import nn

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.contamination import told as told_contamination
from tunesmith.data.render import Renderer
from tunesmith.evaluation.answers import Evaluation, Judged, Judging, chosen_rows, judge, row_nlls
from tunesmith.evaluation.compare import LIKELIHOODS, best_and_worst, compare_forgetting, compare_metrics, judgement
from tunesmith.evaluation.forgetting import GeneralText, general_passages
from tunesmith.evaluation.labels import judge_constant, judge_labels
from tunesmith.evaluation.preferences import falling_likelihood, preference_sentence, preference_summary
from tunesmith.metrics import CALIBRATION_ERROR, confusion
from tunesmith.models.measure import position_limit
from tunesmith.objectives import Preference
from tunesmith.pages.report import report_page
from tunesmith.pipeline.ability import Ability, compare_ability, gate_checks, said_of
from tunesmith.pipeline.contamination import contamination
from tunesmith.pipeline.judging import baseline_of
from tunesmith.pipeline.loaded import scores
from tunesmith.pipeline.memorisation import Probe, not_measured, probe_of, with_remark
from tunesmith.pipeline.own_metrics import unscored
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.rewards import judge_and_score
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_file import recipe_yaml
from tunesmith.run import BASE_EVALUATION, PAGE, PROMPTED_EVALUATION, TUNED_EVALUATION, Run


class Proof:
    """The evaluation of a job: which rows, which text, and how they are answered."""

    def __init__(self, planned: Planned, spec: EvaluateSpec) -> None:
        assert planned.prepared is not None and planned.tokenizer is not None
        self.planned, self.spec = planned, spec
        self.tokenizer = planned.tokenizer
        own = planned.recipe.data.split_seed
        self.rows = chosen_rows(planned.prepared.test, spec.rows, planned.recipe.seed if own is None else own)
        forgetting = "off" if planned.judges is not None else spec.forgetting
        self.general: GeneralText | None = general_passages(
            forgetting, planned.tokenizer, position_limit(planned.config)
        )
        self.ability = Ability(planned, spec)
        self.how = Judging(
            max_new_tokens=planned.plan.max_new_tokens,
            batch_size=spec.batch_size,
            stop_ids=frozenset(planned.prepared.stop_ids),
            packed=planned.plan.packing,
            generates=any(name not in LIKELIHOODS for name in planned.plan.metrics),
            confident=CALIBRATION_ERROR in planned.plan.metrics and not isinstance(planned.objective, Preference),
        )
        self.probe = probe_of(planned, spec, self.rows, self.how)

    def evaluate(self, model: nn.Module, progress: Progress) -> Evaluation:
        """What is stored of one model: its answers, and its losses on general text."""
        objective = self.planned.judges
        if objective is not None:
            judged = judge_labels(model, objective, self.rows, packed=self.how.packed, progress=progress)
            return self._stored(judged)
        score = self.planned.score
        if score is not None:
            judged = judge_and_score(model, self.tokenizer, self.rows, self.how, score, progress)
        else:
            judged = judge(model, self.tokenizer, self.rows, self.how, progress)
        general = None
        if self.general is not None:
            nlls = row_nlls(model, self.general.passages, packed=self.how.packed, progress=progress)
            general = {"nlls": nlls, "targets": [passage.targets for passage in self.general.passages]}
        found = self._stored(judged, _json_safe(general))
        if isinstance(self.probe, Probe):
            found["memorisation"] = self.probe.ask(model, progress)
        return found

    def evaluate_tuned(self, model: nn.Module, base: Evaluation, progress: Progress) -> Evaluation:
        """The same with general ability, of which some is measured against the base's."""
        return {**self.evaluate(model, progress), **self.ability.of_tuned(model, base, progress)}

    def evaluate_base(self, model: nn.Module, progress: Progress) -> Evaluation:
        """The same of the base; where that has no head for these labels, of the best constant answer."""
        objective, prepared = self.planned.judges, self.planned.prepared
        if objective is None or not self.planned.head_is_new or prepared is None:
            return {**self.evaluate(model, progress), **self.ability.of_base(model, progress)}
        return self._stored(judge_constant(objective, self.rows, baseline_of(prepared, objective)))

    def _stored(self, judged: list[Judged], general: dict[str, Any] | None = None) -> Evaluation:
        return {"rows": [row.as_json() for row in self.planned.own.scored(judged)], "general": general}

    @property
    def has_prompt(self) -> bool:
        """Whether the student learns to answer as if it had read a system text."""
        return self.planned.teacher is not None and self.planned.teacher.prompt is not None

    def evaluate_prompted(self, model: nn.Module, progress: Progress) -> Evaluation:
        """Answers of the base behind the teacher's system text."""
        teacher, renderer = self.planned.teacher, self.planned.renderer
        assert teacher is not None and isinstance(renderer, Renderer)
        rows = [teacher.reads(row, renderer) for row in self.rows]
        return self._stored(judge(model, self.tokenizer, rows, self.how, progress))

    def prompted_scores(self, prompted: Evaluation) -> list[dict[str, Any]]:
        """Every metric of the base behind the teacher's system text, with its interval."""
        return scores([Judged(**row) for row in prompted["rows"]], self.planned.plan.metrics, self.spec)

    def compare(self, base: Evaluation, tuned: Evaluation, progress: Progress = silent) -> dict[str, Any]:
        """The part of the report that is evidence."""
        before = [Judged(**row) for row in base["rows"]]
        after = [Judged(**row) for row in tuned["rows"]]
        seed = self.planned.recipe.seed
        metrics, warnings = compare_metrics(self.planned.plan.metrics, before, after, self.spec, seed)
        source = self.general.source if self.general else None
        forgetting = compare_forgetting(source, base["general"], tuned["general"], self.spec, seed)
        warnings += unscored(after, [*self.planned.own.of_row])
        if self.planned.judges is not None:
            forgetting = {"status": "off", "reason": "the model judges now, and writes no text"}
            if self.planned.head_is_new and before:
                said = before[0].answer
                warnings.append(f"the base has no head for this task: it is the best constant answer, {said!r:.60}")
        preference = preference_summary(before, after)
        if isinstance(self.planned.objective, Preference) and (told := falling_likelihood(metrics)):
            warnings.append(told)
        if isinstance(self.probe, Probe):
            memorisation = self.probe.summary(base, tuned, self.spec.confidence)
        else:
            memorisation = not_measured(self.probe, asked=self.spec.memorisation not in ("auto", "off"))
        warnings += memorisation["warnings"]
        ability, gate = compare_ability(base, tuned, self.spec, seed), self.planned.recipe.gate
        seen = contamination(self.planned, self.rows, self.ability.asked, progress)
        said = [*said_of(ability), *told_contamination(seen)]
        decided = judgement(metrics, forgetting, gate, gate_checks(gate, ability), said)
        cut = sum(row.finish_reason == "length" for row in after)
        if after and cut > len(after) // 4:
            warnings.append(f"{cut} of {len(after)} tuned answers were cut off at {self.how.max_new_tokens} new tokens")
        return {
            "verdict": decided.verdict,
            "sentence": with_remark(decided.sentence, memorisation),
            "gate": decided.gate,
            "metrics": metrics,
            "tasks": self._tasks(before, after),
            "preference": preference and {**preference, "sentence": preference_sentence(preference)},
            "confusion": _confusion(before, after) if "accuracy" in self.planned.plan.metrics else None,
            "forgetting": forgetting,
            **ability,
            "contamination": seen,
            "memorisation": memorisation,
            "samples": best_and_worst(metrics[0]["name"], before, after, self.spec.samples) if metrics else {},
            "warnings": warnings,
        }

    def _tasks(self, before: list[Judged], after: list[Judged]) -> list[dict[str, Any]]:
        """Every task apart, where there are several: those that rows name, or else the files they came from."""
        groups: dict[str, list[int]] = {}
        for at, row in enumerate(self.rows):
            groups.setdefault(row.row.task or row.row.source.file, []).append(at)
        if len(groups) < 2:
            return []
        found = []
        for name, places in sorted(groups.items()):
            own, new = ([rows[at] for at in places] for rows in (before, after))
            metrics, _ = compare_metrics(self.planned.plan.metrics, own, new, self.spec, self.planned.recipe.seed)
            found.append({"name": name, "rows": len(places), "metrics": metrics})
        return found


def _confusion(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Any] | None:
    """Which label either model gave for which; None where the answers are not a few labels."""
    if not after or any(row.answer is None or not row.references for row in (*before, *after)):
        return None
    references = [row.references for row in after]
    tables = [confusion([row.answer or "" for row in rows], references) for rows in (before, after)]
    if tables[0] is None or tables[1] is None:
        return None
    return {"labels": tables[1][0], "base": tables[0][1].tolist(), "tuned": tables[1][1].tolist()}


def _json_safe(general: dict[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no NaN: text whose likelihood is not finite cannot be compared at all."""
    if general is None or any(value - value != 0.0 for value in general["nlls"]):
        return None
    return general


def stored_evaluation(run: Run, name: str, measure: Callable[[], Evaluation] | None) -> Evaluation:
    """The evaluation that the run holds, or a fresh one, which is then stored."""
    if (run.path / name).is_file():
        with suppress(InputError):  # a damaged one is measured again
            return cast(Evaluation, run.read(name))
    found: Evaluation = {"rows": [], "general": None} if measure is None else measure()
    run.write(name, found)
    return found


def write_page(run: Run, report: dict[str, Any]) -> None:
    """Writes `report.html`."""
    run.write_text(PAGE, report_page(report))


def written_report(
    run: Run, planned: Planned, proof: Proof | None, measured: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """What `report.json` says of a run."""
    assert planned.prepared is not None
    evidence: dict[str, Any] = {
        "verdict": "no_difference",
        "sentence": "No difference shown: the evaluation was switched off, so nothing was measured.",
        "gate": [],
        "metrics": [],
        "tasks": [],
        "preference": None,
        "confusion": None,
        "forgetting": {"status": "off", "reason": "evaluate is off"},
        "benchmarks": [],
        "benchmark_notes": [],
        "divergence": {"status": "off", "reason": "evaluate is off"},
        "contamination": [],
        "memorisation": not_measured("evaluate is off"),
        "samples": {},
        "warnings": [],
    }
    if proof is not None:
        evidence = proof.compare(run.read(BASE_EVALUATION), run.read(TUNED_EVALUATION))
        if proof.has_prompt:
            evidence["prompted"] = proof.prompted_scores(run.read(PROMPTED_EVALUATION))
    plan = planned.plan
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    environment = run.read("environment.json")
    return {
        **evidence,
        "name": run.path.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": [*evidence["warnings"], *plan.notes, *notes],
        "data": planned.prepared.manifest(),
        "predicted": {
            "peak_bytes": plan.memory.peak_bytes,
            "peak_phase": plan.memory.peak_phase,
            "seconds": plan.time.seconds,
            "train_seconds": plan.time.train_seconds,
            "evaluate_seconds": plan.time.evaluate_seconds,
            "time_from": plan.time.source,
        },
        "measured": measured,
        "curves": {
            "train": sorted({event["step"]: event["loss"] for event in steps if event["loss"] is not None}.items()),
            "validation": [[e["step"], e["loss"]] for e in events if e["event"] == "validation"],
            "best_step": next((e.get("best_step") for e in events if e["event"] == "trained"), None),
            "rollouts": _rollouts(events),
        },
        "parameters": plan.parameters.model_dump(),
        "model": planned.recipe.model.path,
        "method": planned.recipe.method.kind,
        "objective": planned.recipe.objective.kind,
        "recipe": recipe_yaml(planned.recipe),
        "resolved": [item.model_dump() for item in plan.resolved],
        "environment": _flat(environment),
        "command": f"tunesmith train {run.path / 'recipe.yaml'} output={run.path}-again",
    }


def _rollouts(events: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Every number that rollouts were logged with, by name, over the steps; of a step done again the last one."""
    by_step = {event["step"]: event for event in events if event["event"] == "rollout"}
    names = dict.fromkeys(name for event in by_step.values() for name in event if name not in ("event", "step", "best"))
    return {name: [[step, event[name]] for step, event in sorted(by_step.items()) if name in event] for name in names}


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    versions = {name: version for name, version in environment.get("versions", {}).items() if version}
    rest = {name: value for name, value in environment.items() if name not in ("versions", "command")}
    return {**rest, **versions, "host": platform.machine()}
