"""`tunesmith data check`: what is wrong with rows, on a terminal, as JSON or as a page."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.files import write_text

if TYPE_CHECKING:
    from tunesmith.data.spec import DataSpec
    from tunesmith.pipeline.checking import Checked
    from tunesmith.recipe import Recipe
    from tunesmith.recipe_stages import StagedRecipe

MARKS = {"problem": ("✗ problem", "bold red"), "warning": ("! warning", "bold yellow"), "note": ("· note", "dim")}
SHOWN = 3
"""Instances of a finding that fit on a screen; `--json` and `--html` have more."""


def run_check(
    files: Sequence[str],
    *,
    recipe: Path | None,
    model: str | None,
    benchmarks: Sequence[str],
    fix: Path | None,
    html: Path | None,
    as_json: bool,
) -> int:
    """Checks files, or the data of a recipe, and returns the exit code: 2 when training would refuse the rows."""
    asked = None
    if recipe is not None:
        from tunesmith.recipe_stages import StagedRecipe, read_job  # not above: files alone need no torch

        asked = read_job(recipe)
        if isinstance(asked, StagedRecipe):
            return _check_stages(asked, files, benchmarks, fix=fix, html=html, as_json=as_json)
    return _check(_asked(files, asked, benchmarks), model=model, fix=fix, html=html, as_json=as_json)


def _check_stages(
    recipe: StagedRecipe,
    files: Sequence[str],
    benchmarks: Sequence[str],
    *,
    fix: Path | None,
    html: Path | None,
    as_json: bool,
) -> int:
    """Checks the data of every stage, by the tokens of what it starts from."""
    from tunesmith.pipeline.stages import recipe_to_plan

    for option, given in (("FILE…", files), ("--fix", fix), ("--html", html)):
        if given:
            raise InputError("this is for the data of one job, and the recipe has stages", where=option)
    codes = []
    for stage in recipe.stages:
        if not as_json:
            out(f"\nstage {stage.name}")
        job, _, _ = recipe_to_plan(recipe, stage)
        codes.append(_check(_asked([], job, benchmarks), as_json=as_json, stage=stage.name))
    return max(codes)


def _check(
    asked: tuple[DataSpec, Sequence[str], str | None],
    *,
    model: str | None = None,
    fix: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
    stage: str | None = None,
) -> int:
    spec, held, own = asked
    from tunesmith.data.ingest import ingesting_aside
    from tunesmith.data.sources import readings

    with Display(as_json) as display, ingesting_aside(readings(spec, held)) as reading_is_done:
        quiet_libraries()
        from tunesmith.pipeline.checking import check_data, counting_model, write_fixed

        counting = counting_model(model or own, spec, display.progress)
        reading_is_done(display.progress)
        checked = check_data(spec, held=held, counting=counting, progress=display.progress)
        fixed = write_fixed(checked, spec, fix) if fix is not None else None
    found = checked.as_json() if stage is None else {"stage": stage, **checked.as_json()}
    if fixed is not None:
        found["fixed"] = {
            "path": str(fixed.path),
            "dropped_list": str(fixed.dropped_path),
            "rows_kept": fixed.kept,
            "rows_dropped": fixed.dropped,
        }
    if html is not None:
        _write_page(html, found)
    if as_json:
        out(json.dumps(found))
    else:
        _print(checked, found)
        if html is not None:
            out(f"page: {html}")
    return 2 if checked.refused and fixed is None else 0


def _asked(
    files: Sequence[str], asked: Recipe | None, benchmarks: Sequence[str]
) -> tuple[DataSpec, Sequence[str], str | None]:
    """The `data` section that is checked, files to compare it with, and the recipe's model."""
    from tunesmith.data.spec import SELF, DataSpec

    if asked is None:
        if not files:
            raise InputError("there is nothing to check", fix="name a file, or a recipe with --recipe")
        return DataSpec(train=files[0], benchmarks=list(benchmarks)), files[1:], None
    changed: dict[str, Any] = {"benchmarks": [*asked.data.benchmarks, *benchmarks]}
    if asked.data.replay is not None and asked.data.replay.path == SELF:  # which is written when the run begins
        changed["replay"] = None
    if files:
        changed |= {"train": files[0], "validation": None, "test": "auto", "replay": None}
    return asked.data.model_copy(update=changed), files[1:], asked.model.path


def _write_page(html: Path, found: dict[str, Any]) -> None:
    from tunesmith.pages.check import check_page

    try:
        write_text(html, check_page(found))
    except OSError as error:
        raise InputError(
            f"the page cannot be written: {error.strerror}", where=html, fix="name a file in a directory that exists"
        ) from error


def _print(checked: Checked, found: dict[str, Any]) -> None:
    console = Console()
    width = min(shutil.get_terminal_size((100, 20)).columns, 120)
    for source in found["sources"]:
        _say(console, f"{source['path']}: {source['rows']:,} rows, {source['format']}")
    for note in found["notes"]:
        _say(console, f"note: {note}")
    _print_lengths(console, found["lengths"])
    for finding in checked.findings:
        mark, style = MARKS[finding.level]
        console.print(Text(f"\n{mark}  ", style).append(finding.title, "bold"), soft_wrap=True)
        for instance in finding.instances[:SHOWN]:
            beside = f" (as {instance.other})" if instance.other else ""
            _say(console, f"    {instance.source}: {instance.what}{beside}")
        if finding.rows > SHOWN:
            _say(console, f"    … {finding.rows:,} in all")
        wrapped = textwrap.wrap(finding.fix, max(40, width - 6))
        for at, line in enumerate(wrapped):
            _say(console, f"    {' ' if at else '→'} {line}")
    _print_end(console, checked, found)


def _say(console: Console, text: str) -> None:
    """Prints text as it is: paths and quotations are no markup, and a long line is broken by the terminal alone."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_lengths(console: Console, lengths: dict[str, Any]) -> None:
    counted = f" of {lengths['counted_by']}" if lengths["counted_by"] else ""
    limit = f", limit {lengths['limit']:,}" if lengths["limit"] else ""
    _say(
        console,
        f"\nlengths in {lengths['unit']}{counted}: {lengths['least']:,} to {lengths['most']:,}, half of the rows up to "
        f"{lengths['p50']:,}, 99 % up to {lengths['p99']:,}{limit}",
    )
    if not lengths["counted_by"]:
        _say(console, "  (name a model with --model to count its tokens)")
    most = max((entry["rows"] for entry in lengths["histogram"]), default=0)
    for entry in lengths["histogram"]:
        bar = "█" * max(round(40 * entry["rows"] / most), 1 if entry["rows"] else 0) if most else ""
        span = f"{entry['from']:,} – {entry['to'] - 1:,}"
        _say(console, f"  {span:>17}  {bar} {entry['rows']:,}")


def _print_end(console: Console, checked: Checked, found: dict[str, Any]) -> None:
    counts = {level: sum(finding.level == level for finding in checked.findings) for level in MARKS}
    said = [f"{number} {level}{'' if number == 1 else 's'}" for level, number in counts.items() if number]
    end = "training would take these rows"
    if checked.refused:
        end = "training would refuse these rows"
    elif counts["problem"]:
        end += ", but look at what was found"
    _say(console, f"\n{', '.join(said) or 'nothing found'}: {end}")
    if "fixed" in found:
        fixed = found["fixed"]
        _say(
            console,
            f"wrote {fixed['rows_kept']:,} rows to {fixed['path']}; the {fixed['rows_dropped']:,} left out are listed "
            f"with reasons in {fixed['dropped_list']}",
        )
