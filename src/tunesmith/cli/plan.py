"""`tunesmith plan`: what a job needs, what fits where, what fits into a budget, and one dry step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.base import InputError, nearest
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned, duration, plan_lines, size
from tunesmith.recipe import Recipe
from tunesmith.recipe_limits import BudgetSpec

if TYPE_CHECKING:
    from tunesmith.pipeline.budgeting import Choice
    from tunesmith.pipeline.dry_step import DryStep
    from tunesmith.plan.table import Table

LIMITS = ("memory", "time", "money")


@dataclass(frozen=True)
class Asked:
    """What is wanted besides the plan."""

    table: bool = False
    budget: Sequence[str] = ()
    machines: Path | None = None
    probe: bool = False
    calibrate: bool = False


def show_plan(recipe: Recipe, asked: Asked, *, as_json: bool) -> None:
    """Prints the plan, or the table, or the best plan inside a budget."""
    from tunesmith.plan.machines import read_machines

    quiet_libraries()
    questions = {"--table": asked.table, "--budget": bool(asked.budget), "--probe": asked.probe}
    wanted = [name for name, is_wanted in questions.items() if is_wanted]
    if len(wanted) > 1:
        raise InputError(f"{' and '.join(wanted)} are different questions", where=wanted[-1], fix="ask one at a time")
    if asked.calibrate and (asked.table or asked.budget):
        raise InputError(
            "a table or a budget is not made from timed blocks", where="--calibrate", fix="ask for the plan alone"
        )
    if asked.table:
        from tunesmith.pipeline.budgeting import table_of

        with Display(as_json) as display:
            table = table_of(recipe, read_machines(asked.machines), display.progress)
        out(json.dumps(table.as_json()) if as_json else "\n".join(table_lines(table)))
        return
    budget = budget_of(asked.budget) if asked.budget else _own_budget(recipe)
    if budget is not None:
        from tunesmith.pipeline.budgeting import within_budget

        with Display(as_json) as display:
            choice = within_budget(recipe, budget, read_machines(asked.machines), display.progress)
        out(json.dumps(choice.as_json()) if as_json else "\n".join(choice_lines(choice, recipe)))
        return
    if asked.machines is not None:
        raise InputError(
            "a table of machines is for --table and --budget",
            where="--machines",
            fix="add one of them, or leave it out",
        )
    _show(recipe, asked, as_json=as_json)


def _own_budget(recipe: Recipe) -> BudgetSpec | None:
    """The recipe's budget where it says more than how much memory a process may have, which planning itself keeps."""
    limited = recipe.budget.time is not None or recipe.budget.money is not None
    return recipe.budget if limited else None


def _show(recipe: Recipe, asked: Asked, *, as_json: bool) -> None:
    from tunesmith.pipeline.estimating import estimate_job

    measured: DryStep | None = None
    with Display(as_json) as display:
        planned = estimate_job(recipe, display.progress)
        if asked.calibrate:
            from tunesmith.pipeline.calibration import calibrated

            planned = calibrated(planned, display.progress)
        if asked.probe:
            from tunesmith.pipeline.dry_step import dry_step

            measured = dry_step(planned, display.progress)
    if as_json:
        values = planned.plan.model_dump(mode="json")
        out(json.dumps({**values, **({} if measured is None else {"probe": measured.as_json()})}, indent=2))
        return
    lines = plan_lines(planned.plan, recipe.model.path)
    out("\n".join([*lines, *([] if measured is None else ["", *probe_lines(measured)])]))


def budget_of(given: Sequence[str]) -> BudgetSpec:
    """From `memory=8GB`, `time=2h`, `money=5`.

    Raises:
        InputError: naming what is wrong with which.
    """
    values: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        name = name.strip()
        if name not in LIMITS or not equals:
            raise InputError(
                f"{item!r} is no limit{nearest(name, LIMITS)}", where="--budget", fix="such as --budget memory=8GB"
            )
        values[name] = value.strip()
    try:
        return BudgetSpec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}: {said}", where="--budget", fix="such as memory=8GB, time=2h or money=5") from None


def probe_lines(found: DryStep) -> list[str]:
    off = found.peak_bytes / max(1, found.predicted_bytes) - 1
    lines = [
        f"dry step with the largest micro-batch ({found.rows} rows, {found.tokens:,} tokens):",
        f"  memory: {size(found.peak_bytes)} measured, {size(found.predicted_bytes)} predicted for loading and "
        f"training ({off:+.0%})",
        f"  time: {duration(found.seconds)}; the first one, which makes its kernels, {duration(found.first_seconds)}",
    ]
    if found.stands_for is not None:
        lines.append(f"  with the loss of {found.stands_for}: the job's own objective needs more than rows")
    return lines


def table_lines(table: Table) -> list[str]:
    """Machines down, variants across; each cell the largest micro-batch, hours and price."""
    currency = table.machines.currency
    cells = {(cell.machine, cell.variant): cell for cell in table.cells}
    rows = [["machine", "memory", f"{currency}/h", *(variant.name for variant in table.variants)]]
    for machine in (*table.machines.machines, table.here):
        row = [machine.name, f"{machine.memory * machine.count:.0f} GB", _money(machine.price)]
        for variant in table.variants:
            cell = cells[machine.name, variant.name]
            if not cell.fits:
                row.append(f"no: {cell.needed_bytes * machine.count / 1e9:.0f} GB")
                continue
            mark = "*" if cell.checkpointing else ""
            price = "" if cell.price is None else f" {_money(cell.price)}"
            row.append(f"{cell.rows}{mark} {_count(cell.tokens_per_second or 0)}/s {_hours(cell.hours or 0)}{price}")
        rows.append(row)
    lines = aligned(rows, right={1, 2})
    lines += [
        "",
        f"each cell: rows at a time on one device (* with gradient checkpointing), tokens a second, hours, {currency}; "
        "or what one row would need",
        f"for {table.tokens:,} tokens; several devices with train.shard. Rates are {_shares(table)} of the peak: an "
        "assumption, except for this machine, whose products were timed",
        f"prices of {table.machines.date}: {table.machines.source.strip()}",
    ]
    if table.hosted:
        lines += ["", f"the same tokens through an API, {currency}:"]
        lines += [f"  {line}" for line in aligned([[name, _money(price)] for name, price in table.hosted], right={1})]
    return lines


def _shares(table: Table) -> str:
    efficiency = table.machines.efficiency
    return f"{efficiency.cuda:.0%} (CUDA) and {efficiency.mps:.0%} (Apple)"


def _money(price: float | None) -> str:
    return "–" if price is None else f"{price:,.2f}" if price >= 0.005 or not price else "<0.01"


def _count(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.0f}k" if number >= 1e4 else f"{number:.0f}"


def _hours(hours: float) -> str:
    if hours >= 0.1:
        return f"{hours:.1f}h"
    return f"{hours * 60:.1f}min" if hours * 60 >= 1 else f"{hours * 3600:.0f}s"


def choice_lines(choice: Choice, recipe: Recipe) -> list[str]:
    """The proposal, what it gives up, and the settings that make it."""
    price = "" if choice.price is None else f", {_money(choice.price)}"
    lines = [f"on {choice.machine}: {size(choice.memory_bytes)} of memory, {duration(choice.seconds)}{price}", ""]
    lines += ["given up:", *(f"  {text}" for text in choice.given_up or ["nothing"])]
    settings = " ".join(f"{name}={_word(value)}" for name, value in choice.settings.items())
    lines += ["", "settings: " + (settings or "those of the recipe")]
    if choice.plan is not None:
        lines += ["", *plan_lines(choice.plan, recipe.model.path)]
    return lines


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
