"""`tunesmith recipe`: its verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.arguments import AsJson

recipe_app = typer.Typer(
    help="The format of recipes, and recipes from other tools.", invoke_without_command=True, rich_markup_mode=None
)


@recipe_app.callback()
def recipe_main(
    context: typer.Context,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print the reference page in Markdown.")] = False,
) -> None:
    if reference:
        from tunesmith.recipe_reference import recipe_reference

        typer.echo(recipe_reference())
        raise typer.Exit(0)
    if schema:
        from tunesmith.recipe_reference import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@recipe_app.command("import")
def recipe_import(
    file: Annotated[Path, typer.Argument(help="A recipe of Axolotl or LLaMA-Factory.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the recipe here instead of printing it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's recipe into one of ours, saying key by key what became of it."""
    from tunesmith.cli.imported import show_import

    show_import(file, out, as_json=as_json)
