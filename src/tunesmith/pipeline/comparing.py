"""`tunesmith compare`: what differs between runs, and what that did, on the held-out rows that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Evaluation, Judged
from tunesmith.evaluation.compare import judgement, metric_rows
from tunesmith.evaluation.several import compare_systems, corrected, without_unlike_tokens
from tunesmith.pipeline.chain import Chain
from tunesmith.pipeline.locating import run_recipe
from tunesmith.pipeline.resuming import flat_keys
from tunesmith.pipeline.seeds import Seeds
from tunesmith.recipe_file import parse_yaml
from tunesmith.run import BASE_EVALUATION, DATA, PLAN, RECIPE, TUNED_EVALUATION, Run

VERDICTS = {"ship": "better", "dont_ship": "worse", "no_difference": "no_difference"}
"""What the verdict over base and tuned model is called when another run stands where the base does."""
OPENINGS = {"better": "Better than", "worse": "Worse than", "no_difference": "No difference shown to"}
APART = ("output", "seed")
"""Settings in which runs of one system may differ."""
SAMPLES = 8
BASE = "base"

Key = tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Runs that differ in their seed alone, or a single one.

    Attributes:
        name: what the comparison calls them.
        settings: of the first: its recipe by dotted keys, every `auto` replaced by what it became.
        rows: by run, each held-out row as it was answered, by what identifies it.
    """

    name: str
    runs: tuple[Run, ...]
    settings: dict[str, Any]
    rows: tuple[dict[Key, Judged], ...]

    @property
    def first(self) -> Run:
        return self.runs[0]


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Compares finished runs with the first of them; a single one, or seeds of a single one, with the base.

    Runs that differ in nothing but `seed` are one system, whose mean counts.

    Returns:
        `against` (a name), `runs` (each with `name`, `runs`, `seeds`, `verdict` and `sentence` over its own base, and
        `values` by metric), `settings` (those that differ, by name each run's), `rows` (`shared` and `of` each),
        `comparisons` (each with `run`, `verdict`, `sentence` and `metrics` as in a report, where `base` is the run that
        it is compared with), `curves`, `samples` (the shared rows on which the runs differ most) and `warnings`.

    Raises:
        InputError: for what is no finished run, and for runs that share no held-out row.
    """
    systems = _systems([run for path in paths for run in _runs_of(Path(path))])
    spec = run_recipe(systems[0].first).evaluate
    if spec == "off" or not all(rows for system in systems for rows in system.rows):
        off = next((one for one in systems if not all(one.rows)), systems[0])
        raise InputError("its evaluation was switched off, so there is nothing to compare", where=off.first.path)
    keys, warnings = _shared(systems)
    names, told = _metrics(systems)
    answered = [[[rows[key] for key in keys] for rows in system.rows] for system in systems]
    sides = list(zip([system.name for system in systems], answered, strict=True))
    if len(sides) == 1:
        sides.insert(0, (BASE, [[_by_key(systems[0].first, BASE_EVALUATION)[key] for key in keys]]))
    (against, first), *others = sides
    found: list[list[dict[str, Any]]] = []
    seed = run_recipe(systems[0].first).seed
    warnings += told
    for name, rows in others:
        own, left_out = without_unlike_tokens(names, first, rows)
        entries, more = compare_systems(own, first, rows, spec, seed)
        found.append(entries)
        warnings += [f"{name}: {text}" for text in [*([left_out] if left_out else []), *more]]
    comparisons = [
        _comparison(name, against, entries, len(keys))
        for (name, _), entries in zip(others, corrected(found, spec.confidence), strict=True)
    ]
    return {
        "against": against,
        "runs": [_told(system, names, rows) for system, rows in zip(systems, answered, strict=True)],
        "settings": _differences(systems),
        "rows": {"shared": len(keys), "of": [len(system.rows[0]) for system in systems]},
        "comparisons": comparisons,
        "curves": [_curves(system) for system in systems],
        "samples": _samples(names[0], [(name, rows[0]) for name, rows in sides]),
        "warnings": list(dict.fromkeys(warnings)),
    }


def _runs_of(path: Path) -> list[Run]:
    """The runs that a path stands for: itself, or one for each seed."""
    if Seeds.is_here(path):
        runs = list(Seeds.open(path).runs)
    elif Chain.is_here(path):
        runs = [Chain.open(path).last_stage()]
    else:
        runs = [Run.open(path)]
    for run in runs:
        if run.report is None:
            raise InputError("this run is not finished", where=run.path, fix="finish it with --resume, or leave it out")
    return runs


def _systems(runs: Sequence[Run]) -> list[Compared]:
    """Runs grouped by all settings but the seed, in the order given."""
    places = Counter(run.path.resolve() for run in runs)
    if twice := [path for path, count in places.items() if count > 1]:
        raise InputError("this run is named twice", where=twice[0], fix="name each run once")
    groups: dict[str, list[Run]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        own = _settings(run)
        alike = repr(sorted((key, value) for key, value in own.items() if key not in APART))
        # without rows of their own, other seeds are judged on other rows, and are other systems
        groups.setdefault(alike, []).append(run)
        settings.setdefault(alike, own)
    names = _names([_place(found) for found in groups.values()])
    found = []
    for name, (alike, group) in zip(names, groups.items(), strict=True):
        label = f"{name} ({len(group)} seeds)" if len(group) > 1 else name
        rows = tuple(_by_key(run, TUNED_EVALUATION) for run in group)
        found.append(Compared(label, tuple(group), settings[alike], rows))
    return found


def _place(runs: Sequence[Run]) -> Path:
    """Directory of a run, or of the seeds that several are."""
    path = runs[0].path.resolve()
    return path.parent if len(runs) > 1 and Seeds.is_here(path.parent) else path


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that tell runs apart: the directory's, or as much of the path as it takes."""
    for parts in range(1, 6):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _settings(run: Run) -> dict[str, Any]:
    """The recipe by dotted keys, every `auto` as the plan resolved it, and how much was trained."""
    values, _ = parse_yaml((run.path / RECIPE).read_text(encoding="utf-8"), str(run.path / RECIPE))
    plan = run.read(PLAN)
    became = {item["name"]: item["value"] for item in plan["resolved"]}
    flat = {key: became.get(key, value) if value == "auto" else value for key, value in flat_keys(values).items()}
    return {**flat, "plan.steps": plan["steps"], "plan.trained_parameters": plan["parameters"]["trainable"]}


def _differences(systems: Sequence[Compared]) -> dict[str, list[Any]]:
    keys = sorted({key for system in systems for key in system.settings})
    several = any(len(system.runs) > 1 for system in systems)
    found = {key: [system.settings.get(key) for system in systems] for key in keys if key != "output"}
    if several:
        found.pop("seed", None)
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def rows_by_key(run: Run, judged: Sequence[Judged]) -> dict[Key, Judged]:
    """Held-out rows by what identifies them in every run: what they say, or for raw text the place in a known file.

    Rows that are the same are told apart by how often they came before.
    """
    hashes = {source["path"]: source["sha256"] for source in run.read(DATA)["sources"]}
    seen: Counter[Key] = Counter()
    found: dict[Key, Judged] = {}
    for row in judged:
        path, _, line = row.source.rpartition(":")
        said = row.prompt or row.references
        key = (row.prompt, *row.references) if said else (hashes.get(path, path), line)
        found[(*key, str(seen[key]))] = row
        seen[key] += 1
    return found


def _by_key(run: Run, name: str) -> dict[Key, Judged]:
    stored: Evaluation = run.read(name)
    return rows_by_key(run, [Judged(**row) for row in stored["rows"]])


def _shared(systems: Sequence[Compared]) -> tuple[list[Key], list[str]]:
    """The rows that every run answered, in the first run's order, and a warning where some did not."""
    every = [rows for system in systems for rows in system.rows]
    keys = [key for key in every[0] if all(key in rows for rows in every)]
    counts = [len(rows) for rows in every]
    if not keys:
        raise InputError(
            f"these runs share no held-out row: each was judged on rows of its own ({', '.join(map(str, counts))})",
            where=", ".join(str(run.path) for system in systems for run in system.runs),
            fix="name the rows in a file that all recipes have as data.test, or give them one data.split_seed",
        )
    if len(keys) < max(counts):
        return keys, [f"compared on the {len(keys)} held-out rows that all share, of {', '.join(map(str, counts))}"]
    return keys, []


def _metrics(systems: Sequence[Compared]) -> tuple[list[str], list[str]]:
    """Metrics that every run was judged by, the first run's deciding one first."""
    each = [system.first.read(PLAN)["metrics"] for system in systems]
    names = [name for name in each[0] if all(name in other for other in each)]
    if not names:
        raise InputError(
            f"these runs were judged by different metrics: {'; '.join(', '.join(one) for one in each)}",
            where=str(systems[0].first.path),
            fix="set evaluate.metrics alike",
        )
    lost = sorted({name for other in each for name in other if name not in names})
    warnings = [f"not every run was judged by {', '.join(lost)}"] if lost else []
    if names[0] != each[0][0]:
        warnings.append(f"{each[0][0]} decided {systems[0].name} and was not measured on all: {names[0]} decides here")
    return names, warnings


def _comparison(name: str, against: str, entries: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    if not entries:
        return {"run": name, "verdict": None, "sentence": f"{name}: no metric could be measured.", "metrics": []}
    verdict = VERDICTS[judgement(entries, {"status": "off"}, {}).verdict]
    entry = entries[0]
    span = "" if entry["low"] is None else f", interval {entry['low']:+.3g} to {entry['high']:+.3g}"
    sentence = (
        f"{OPENINGS[verdict]} {against}: {name} has {entry['name']} {entry['tuned']:.4g} instead of "
        f"{entry['base']:.4g} (difference {entry['difference']:+.3g}{span}, {rows} held-out rows)."
    )
    return {"run": name, "verdict": verdict, "sentence": sentence, "metrics": entries}


def _told(system: Compared, names: Sequence[str], answered: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    report = system.first.report or {}
    values: dict[str, list[float]] = {}
    for name in names:
        stats = [metric_rows(name, rows) for rows in answered]
        values[name] = [stat.corpus() for stat in stats if stat is not None]
    return {
        "name": system.name,
        "runs": [str(run.path) for run in system.runs],
        "seeds": [run_recipe(run).seed for run in system.runs],
        "verdict": report["verdict"],
        "sentence": report["sentence"],
        "values": values,
        "seconds": report["measured"].get("seconds"),
        "peak_bytes": report["measured"].get("peak_bytes"),
    }


def _curves(system: Compared) -> dict[str, Any]:
    report = system.first.report or {}
    curves, objective = report.get("curves") or {}, report.get("objective")
    return {
        "run": system.name,
        "objective": objective,
        "train": curves.get("train") or [],
        "validation": curves.get("validation") or [],
    }


def _samples(name: str, sides: Sequence[tuple[str, Sequence[Judged]]]) -> list[dict[str, Any]]:
    """The rows on which scores of the deciding metric lie farthest apart; of runs with seeds the first seed's."""
    stats = [metric_rows(name, rows) for _, rows in sides]
    scores = [stat.per_row().tolist() for stat in stats if stat is not None and len(stat) == len(sides[0][1])]
    if len(scores) < len(sides):
        return []
    apart = sorted(
        range(len(scores[0])), key=lambda at: min(one[at] for one in scores) - max(one[at] for one in scores)
    )
    return [
        {
            "source": sides[0][1][at].source,
            "prompt": sides[0][1][at].prompt,
            "references": sides[0][1][at].references,
            "answers": [
                {"run": run, "answer": rows[at].answer, "score": own[at]}
                for (run, rows), own in zip(sides, scores, strict=True)
            ],
        }
        for at in apart[:SAMPLES]
        if len({one[at] for one in scores}) > 1
    ]
