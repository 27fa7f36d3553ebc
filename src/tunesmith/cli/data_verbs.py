"""`tunesmith data`: its verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.cli.arguments import AsJson, Overrides, RecipePath
from tunesmith.cli.importing import importing

data_app = typer.Typer(help="Look at data as the model will see it.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("show")
def data_show(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    worst: Annotated[
        Literal["longest", "most-cut", "fewest-targets"] | None,
        typer.Option(help="Show the worst rows of this kind instead of the first."),
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Show too which rows share a block in the first optimizer steps.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page instead of printing.")] = None,
    stage: Annotated[str | None, typer.Option(help="Of a recipe with stages: which one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show every token of some rows as trained, masked or cut: the trainer's own ids and weights."""
    with importing():
        from tunesmith.cli.show import show_rows
        from tunesmith.cli.stages import read_stage

    asked = read_stage(recipe, overrides or [], stage)
    show_rows(asked, rows=rows, worst=worst, packing=packing, html=html, as_json=as_json)


@data_app.command("check")
def data_check(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Training rows, and after them files of rows that are held out.", metavar="FILE…"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", help="Read and measure rows as this recipe says.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Count the tokens of this model.")] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="A benchmark that training rows must not hold; may be given several times.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write the rows that are left, and a list of what was dropped and why.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for everything that is wrong with rows; exits 2 when training would refuse them."""
    from tunesmith.cli.check import run_check

    code = run_check(
        files or [], recipe=recipe, model=model, benchmarks=benchmark or [], fix=fix, html=html, as_json=as_json
    )
    raise typer.Exit(code)


@data_app.command("presets")
def data_presets(as_json: AsJson = False) -> None:
    """List the public data sets that a recipe can name."""
    from tunesmith.cli.display import out
    from tunesmith.cli.tables import aligned
    from tunesmith.data.presets import PRESETS

    if as_json:
        out(json.dumps({name: {**vars(preset), "columns": dict(preset.columns)} for name, preset in PRESETS.items()}))
        return
    names = ["name", "hub id", "format", "licence", "about"]
    rows = [[name, one.path, one.format, one.licence, one.about] for name, one in PRESETS.items()]
    out("\n".join(aligned([names, *rows])))
