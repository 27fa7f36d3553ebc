"""Going on with a run: only with its own recipe and data, or with changes that are named and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.pipeline.lineage import write_lineage
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.reproduce import write_reproduce_script
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import parse_yaml, recipe_yaml
from tunesmith.resolved import Plan
from tunesmith.run import CHANGES, DATA, PLAN, RECIPE, Run


def changed_keys(run: Run, recipe: Recipe) -> dict[str, list[Any]]:
    """The keys in which a recipe differs from the run's own, each with its value then and now."""
    return changed_between(run.path / RECIPE, recipe_yaml(recipe))


def changed_between(stored: Path, now: str) -> dict[str, list[Any]]:
    """The keys in which a recipe, as it would be stored, differs from a stored one, with their values then and now."""
    before, _ = parse_yaml(stored.read_text(encoding="utf-8"), str(stored))
    after, _ = parse_yaml(now, "recipe")
    old, new = flat_keys(before), flat_keys(after)
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key != "output"
    }


def refuse_another_recipe(run: Run, recipe: Recipe, forced: Sequence[str] = ()) -> None:
    """Raises InputError when the recipe is not the one that the run was started with, naming what differs.

    Args:
        forced: keys that may differ, because the user said so.
    """
    refuse_changes(run.path / RECIPE, changed_keys(run, recipe), forced)


def refuse_changes(stored: Path, changed: dict[str, list[Any]], forced: Sequence[str]) -> None:
    """Raises InputError for the first changed key that was not forced."""
    changed = {key: values for key, values in changed.items() if not _is_forced(key, forced)}
    for key, (before, now) in changed.items():
        others = f" ({len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
        raise InputError(
            f"{key} is {now!r} now and was {before!r} when the run began{others}",
            where=stored,
            fix=f"resume with the run's own recipe, say --force {key}=… to go on with the change, or start a new run: "
            "output=runs/NAME",
        )


def resumed_plan(run: Run, planned: Planned, forced: Sequence[str] = ()) -> Plan:
    """The plan a resumed run goes on with: its own, or a new one when settings were changed by force.

    Raises:
        InputError: when the data is not what the run was started with, naming what differs.
    """
    assert planned.prepared is not None
    if not any(_is_forced(key, forced) for key in ("data.train", "data.test", "data.validation")):
        stored = run.read(DATA)
        for old, new in zip(stored["sources"], planned.prepared.sources, strict=True):
            if old["sha256"] != new["sha256"] or old["rows"] != new["rows"]:
                raise InputError(
                    f"{new['path']} has changed since the run began",
                    where=run.path,
                    fix="restore the file, or start a new run: output=runs/NAME",
                )
    return planned.plan if forced else Plan.model_validate(run.read(PLAN))


def record_changes(run: Run, planned: Planned, step: int) -> None:
    """Writes the changed recipe, plan and data into the run, and what it was before."""
    assert planned.prepared is not None
    changed = changed_keys(run, planned.recipe)
    if not changed:
        return
    history = run.read(CHANGES) if (run.path / CHANGES).is_file() else []
    run.write(CHANGES, [*history, {"step": step, "changes": changed}])
    run.write(PLAN, planned.plan.model_dump(mode="json"))
    run.write(DATA, planned.prepared.manifest())
    run.write_text(RECIPE, recipe_yaml(planned.recipe))
    write_lineage(run, planned, None)
    write_reproduce_script(run, planned)


def _is_forced(key: str, forced: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in forced)


def flat_keys(values: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted keys."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    flat: dict[str, Any] = {}
    for name, inner in values.items():
        flat |= flat_keys(inner, f"{prefix}{name}.")
    return flat
