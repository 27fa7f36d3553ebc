"""The options of `tunesmith advise`, which are the answers that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.arguments import AsJson
from tunesmith.cli.importing import importing


@dataclass(frozen=True)
class AnswerOptions:
    """The answers, each under its name in a file of answers."""

    answers: Annotated[
        Path | None, typer.Argument(help="Answers in a YAML file; flags go before them.", metavar="[ANSWERS]")
    ] = None
    change: Annotated[
        list[str] | None,
        typer.Option(help="What must change: facts, style, format, behaviour or domain-language; may be repeated."),
    ] = None
    knowledge_changes: Annotated[str | None, typer.Option(help="never, yearly, monthly, weekly or daily.")] = None
    examples: Annotated[str | None, typer.Option(help="Examples of good answers that exist.", metavar="N")] = None
    tokens: Annotated[str | None, typer.Option(help="Tokens of raw text that exist.", metavar="N")] = None
    data: Annotated[str | None, typer.Option(help="The file with them, which is looked at.", metavar="FILE")] = None
    metric: Annotated[str | None, typer.Option(help="How success is measured.", metavar="NAME")] = None
    tried: Annotated[
        list[str] | None, typer.Option(help="What was too weak: prompting, few-shot or rag; may be repeated.")
    ] = None
    latency: Annotated[str | None, typer.Option(help="Milliseconds until an answer begins.", metavar="MS")] = None
    maintained: Annotated[str | None, typer.Option(help="Whether somebody will train again: yes or no.")] = None
    prompt_tokens: Annotated[str | None, typer.Option(help="Length of the prompt today.", metavar="N")] = None
    shots: Annotated[str | None, typer.Option(help="Examples that the prompt needs to work.", metavar="N")] = None
    context: Annotated[str | None, typer.Option(help="Positions of the model.", metavar="N")] = None
    private: Annotated[str | None, typer.Option(help="Whether the data are private: yes or no.")] = None
    task: Annotated[str | None, typer.Option(help="generate, classify, tag or regress.")] = None
    model: Annotated[str | None, typer.Option(help="The base model of the recipe.")] = None
    parameters: Annotated[str | None, typer.Option(help="Its parameters, such as 8B.", metavar="N")] = None
    memory: Annotated[str | None, typer.Option(help="Memory for training, in GB.", metavar="GB")] = None
    money: Annotated[str | None, typer.Option(help="What one training may cost.", metavar="SUM")] = None
    write: Annotated[Path | None, typer.Option(help="Write the recipe to a new file.", metavar="RECIPE")] = None


@dataclass(frozen=True)
class AdviseOptions(AnswerOptions):
    """The answers, and what is done with them."""

    measure: Annotated[
        Path | None,
        typer.Option(help="Measure the ladder on this recipe's held-out rows instead.", metavar="RECIPE"),
    ] = None
    target: Annotated[float | None, typer.Option(help="With --measure: what the metric must reach.")] = None
    output: Annotated[
        Path | None, typer.Option(help="With --measure: where answers and page are kept.", metavar="DIR")
    ] = None
    cost: Annotated[bool, typer.Option("--cost", help="Compare the costs of retrieval and tuning instead.")] = False
    queries: Annotated[float | None, typer.Option(help="With --cost: questions a month; else 5,000.")] = None
    months: Annotated[int | None, typer.Option(help="With --cost: the horizon; else 12.")] = None
    prices: Annotated[
        Path | None, typer.Option(help="With --cost or --measure: your prices, a YAML file.", metavar="FILE")
    ] = None
    html: Annotated[Path | None, typer.Option("--html", help="With --cost or --measure: write a page there too.")] = (
        None
    )
    as_json: AsJson = False

    def given(self) -> dict[str, Any]:
        return dict(vars(self))


def advise(options: AdviseOptions) -> None:
    """Say whether to fine-tune at all, why, and what would change that; asks on a terminal."""
    if options.measure is not None:
        from tunesmith.cli.ladder import run_ladder

        raise typer.Exit(run_ladder(options.measure, options.given()))
    _refuse_idle(options)
    with importing():
        from tunesmith.cli.advise import CostQuestion, flags_of, run_advice, run_costs

    flags = flags_of(options.given())
    if options.cost:
        asked = CostQuestion(options.queries, options.months, options.prices, options.html)
        run_costs(options.answers, flags, asked, as_json=options.as_json)
    else:
        run_advice(options.answers, flags, write=options.write, as_json=options.as_json)


def _refuse_idle(options: AdviseOptions) -> None:
    """Raises InputError for an option that would do nothing."""
    from tunesmith.base import InputError

    of_measure = ("target", "output")
    of_either = ("prices", "html")
    of_cost = ("queries", "months")
    idle = ("write", *of_measure) if options.cost else (*of_measure, *of_either, *of_cost)
    for name in idle:
        if getattr(options, name) is not None:
            verb = "the advice" if name == "write" else "--measure" if name in of_measure else "--cost"
            verb += " or --measure" * (name in of_either)
            fix = "leave out --cost" if name == "write" else f"add {verb}, or leave it out"
            raise InputError(f"this is for {verb}, and would do nothing", where=f"--{name}", fix=fix)
