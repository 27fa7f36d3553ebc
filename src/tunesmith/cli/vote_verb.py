"""`tunesmith vote`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.arguments import AsJson
from tunesmith.cli.importing import importing


def vote(
    a: Annotated[
        str | None,
        typer.Argument(help="A run, adapter, model, or file of answers (JSONL).", metavar="A", show_default=False),
    ] = None,
    b: Annotated[
        str | None,
        typer.Argument(help="The other one; `base` is the base of A.", metavar="B", show_default=False),
    ] = None,
    on: Annotated[str | None, typer.Option("--on", help="Rows with prompts that both answer.")] = None,
    rater: Annotated[str, typer.Option(help="Who votes; several people use several names.")] = "me",
    rows: Annotated[int, typer.Option("--rows", min=1, help="At most this many rows.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that is generated.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sides on which answers are shown.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where answers and votes are kept.")] = None,
    votes: Annotated[Path | None, typer.Option("--votes", help="Take votes from a file instead of asking.")] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="Let a model vote too: an OpenAI-compatible address, http://HOST/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Its name at that address.")] = None,
    judge_key_env: Annotated[
        str | None, typer.Option("--judge-key-env", help="The environment variable that holds the key for it.")
    ] = None,
    results: Annotated[Path | None, typer.Option("--results", help="Print what the votes of a poll come to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which of two models' answers is better without knowing whose they are; then who wins, and how surely."""
    with importing():
        from tunesmith.cli.vote import Ballot, JudgeOptions, run_vote, show_results

    if results is not None:
        show_results(results, as_json=as_json)
        return
    options = JudgeOptions(judge, judge_model, judge_key_env)
    ballot = Ballot(a, b, on, rater, rows, max_new_tokens, seed, out, votes)
    run_vote(ballot, options, as_json=as_json)
