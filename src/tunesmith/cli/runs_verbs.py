"""`tunesmith runs`: its verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.arguments import AsJson
from tunesmith.cli.importing import importing

runs_app = typer.Typer(
    help="List runs, each below the one that it comes from, with their verdicts.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@runs_app.callback()
def runs(
    context: typer.Context,
    root: Annotated[Path, typer.Option("--root", "-C", help="Where to look.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    if context.invoked_subcommand is None:
        from tunesmith.cli.runs import show_runs

        show_runs(root, as_json=as_json)


@runs_app.command("schema")
def runs_schema() -> None:
    """Print the JSON schema of a run's report.json."""
    from tunesmith.report import report_schema

    typer.echo(json.dumps(report_schema(), indent=2, ensure_ascii=False))


@runs_app.command("forgetting")
def runs_forgetting(run: Annotated[Path, typer.Argument(help="A run.")], as_json: AsJson = False) -> None:
    """Task score against forgetting over the checkpoints of a run, as table and page."""
    with importing():
        from tunesmith.cli.benchmarks import show_forgetting

    show_forgetting(run, as_json=as_json)


@runs_app.command("verify")
def runs_verify(run: Annotated[Path, typer.Argument(help="A run.")], as_json: AsJson = False) -> None:
    """Check every hash of a run: files, checkpoints, data, base; exits 2 when something has changed."""
    from tunesmith.cli.runs import show_verification

    raise typer.Exit(show_verification(run, as_json=as_json))
