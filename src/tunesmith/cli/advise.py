"""`tunesmith advise`: questions on a terminal, the decision in words or as JSON, and what either way costs."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out
from tunesmith.cli.tables import aligned
from tunesmith.files import write_text
from tunesmith.plan.advise import Advice, Answers, DataLook, advise, look_at, read_answers
from tunesmith.plan.advise.advice import write_recipe
from tunesmith.plan.advise.answers import check_answer, choices_of
from tunesmith.plan.advise.cost import MONTHS_BETWEEN, Costs, Use, compare_costs, read_prices
from tunesmith.plan.advise.situation import Situation

QUESTIONS = (
    ("change", "What must change in what the model does?", "nothing"),
    ("knowledge_changes", "How often do the facts change that answers depend on?", ""),
    ("data", "Is there a file of examples or text? Its path", ""),
    ("examples", "How many examples of good answers are there?", ""),
    ("tokens", "How many tokens of raw text of the field are there?", ""),
    ("tried", "What was tried, measured and found too weak?", "nothing"),
    ("metric", "How is success measured? A metric's name, or none", ""),
    ("latency", "Within how many milliseconds must an answer begin?", ""),
    ("prompt_tokens", "How long is the prompt that works today, in tokens?", ""),
    ("maintained", "Will somebody train again when base model or data change? yes or no", ""),
    ("memory", "How much memory is there for training, in GB?", ""),
    ("parameters", "How many parameters has the model, such as 8B?", ""),
    ("money", "What may one training cost?", ""),
    ("private", "Do the data hold what nobody outside may read? yes or no", ""),
)
"""Name of the answer, the question, and what an empty line means; nothing: not known."""
GOOD = {"fine_tune", "fine_tune_rag", "continued_pretraining"}


@dataclass(frozen=True)
class CostQuestion:
    """What `--cost` compares."""

    queries: float | None
    months: int | None
    prices: Path | None
    html: Path | None


def flags_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are answers and were given."""
    return {name: value for name, value in given.items() if name in Answers.model_fields and value not in (None, [])}


def run_advice(path: Path | None, flags: Mapping[str, Any], *, write: Path | None, as_json: bool) -> None:
    """Asks or reads, decides, and shows."""
    data: DataLook | None = None
    if path is None and not flags:
        if as_json or not sys.stdin.isatty():
            raise InputError(
                "there are no answers, and no terminal to ask on",
                fix="give flags such as --change style --examples 5000, or a YAML file of answers",
            )
        answers = ask(Console())
    else:
        answers = read_answers(path, flags)
    if answers.data is not None:
        with Display(as_json) as display:
            data = look_at(answers.data, display.progress)
    advice = advise(answers, data)
    if write is not None:
        write_recipe(advice, write)
    if as_json:
        out(json.dumps(advice.as_json(), ensure_ascii=False))
        return
    console = Console()
    if console.is_terminal:
        _show(console, advice)
    else:
        out("\n".join(advice_lines(advice)))
    if write is not None:
        out(f"\nrecipe: {write}; `tunesmith plan {write}` says what it needs")


def ask(console: Console) -> Answers:
    """One question after the other; what is no answer is asked again, an empty line is "not known"."""
    console.print("An empty line means that it is not known; several answers are separated by commas.\n", style="dim")
    given: dict[str, Any] = {}
    for name, question, empty in QUESTIONS:
        if not _matters(name, given):
            continue
        words = choices_of(name)
        options = f" [{', '.join(words)}]" if words else ""
        while True:
            said = Prompt.ask(Text(f"{question}{options}"), console=console, default=empty, show_default=bool(empty))
            if not said.strip():
                break
            value = [word.strip() for word in said.split(",")] if name in ("change", "tried") else said.strip()
            try:
                check_answer(name, value)
            except InputError as error:
                console.print(f"{error.what}\n  → {error.fix}", style="yellow", markup=False, highlight=False)
                continue
            given[name] = value
            break
    return read_answers(None, given)


def _matters(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a question is still open after the answers before it."""
    if name == "examples":
        return "data" not in given
    return name != "tokens" or ("domain-language" in given.get("change", []) and "data" not in given)


def advice_lines(advice: Advice) -> list[str]:
    """The decision as plain lines, for a file or a pipe."""
    lines = [f"{advice.strategy}: {advice.sentence}"]
    if advice.method is not None:
        lines.append(f"method {advice.method}, objective {advice.objective}")
    lines += ["", "because"]
    for reason in advice.reasons:
        lines += [f"  {reason.text}", *(f"    ({source})" for source in reason.sources)]
    lines += ["", "what would change it", *(f"  {text}" for text in advice.would_change)]
    if advice.data is not None:
        lines += ["", "the data", *(f"  {line}" for line in aligned(data_rows(advice.data)))]
    if advice.warnings:
        lines += ["", *(f"warning: {text}" for text in advice.warnings)]
    if advice.recipe is not None:
        lines += [
            "",
            f"{_recipe_title(advice)} (--write FILE keeps it)",
            *(f"  {line}" for line in recipe_lines(advice)),
        ]
    return lines


def _recipe_title(advice: Advice) -> str:
    return "recipe" if advice.strategy in GOOD else "recipe of the run to measure that against"


def recipe_lines(advice: Advice) -> list[str]:
    import yaml

    return yaml.safe_dump(advice.recipe, sort_keys=False, allow_unicode=True).splitlines()


def data_rows(data: DataLook) -> list[list[str]]:
    """What was found in the file, name and value."""
    rows = [
        ["file", f"{data.path}: {data.format}, {data.rows:,} rows, about {data.tokens:,} tokens"],
        ["repeated", f"{data.duplicates:,} rows word for word, {data.near_duplicates:,} almost"],
        ["lengths", f"half of the prompts up to {data.median_prompt} words, of the answers up to {data.median_answer}"],
    ]
    if not data.is_text:
        rows.append(["form", f"{data.same_form:.0%} of the answers are {data.form}"])
        rows.append(
            ["facts", f"{data.new_facts:.0%} of the answers have names or numbers that are not in the question"]
        )
    rows.append(["stale", f"{data.stale:.0%} have years, prices, versions or the like"])
    if data.labels:
        rows.append(["labels", f"{data.labels} different answers: these look like labels (--task classify)"])
    return rows


def _show(console: Console, advice: Advice) -> None:
    style = "green" if advice.strategy in GOOD else "red" if advice.strategy == "do_not" else "cyan"
    heading = Text(advice.sentence, f"bold {style}")
    if advice.method is not None:
        heading.append(f"\nmethod {advice.method}, objective {advice.objective}", "default")
    console.print(Panel(heading, title=advice.strategy, title_align="left", border_style=style, expand=False))
    width = min(shutil.get_terminal_size((100, 20)).columns, 100)
    _section(console, "Why", [(reason.text, reason.sources) for reason in advice.reasons], width)
    _section(console, "What would change it", [(text, ()) for text in advice.would_change], width)
    if advice.data is not None:
        console.print(Text("\nThe data", "bold"))
        table = Table.grid(padding=(0, 2))
        for name, value in data_rows(advice.data):
            table.add_row(Text(f"  {name}", "dim"), Text(value))
        console.print(table)
    if advice.warnings:
        _section(console, "Warnings", [(text, ()) for text in advice.warnings], width, mark="!", style="yellow")
    if advice.recipe is not None:
        title = _recipe_title(advice).capitalize()
        console.print(Text(f"\n{title}", "bold").append("  (--write FILE keeps it)", "not bold dim"))
        console.print(Text("\n".join(f"  {line}" for line in recipe_lines(advice)), "cyan"))


def _section(
    console: Console,
    title: str,
    items: Sequence[tuple[str, Sequence[str]]],
    width: int,
    *,
    mark: str = "•",
    style: str = "default",
) -> None:
    console.print(Text(f"\n{title}", "bold"))
    for text, sources in items:
        wrapped = textwrap.wrap(text, max(40, width - 4))
        for at, line in enumerate(wrapped):
            console.print(Text(f"  {mark if at == 0 else ' '} ", style).append(line, "default"))
        for source in sources:
            for line in textwrap.wrap(source, max(40, width - 4)):
                console.print(Text(f"    {line}", "dim"))


def run_costs(path: Path | None, flags: Mapping[str, Any], asked: CostQuestion, *, as_json: bool) -> None:
    """Compares retrieval with tuning over the horizon."""
    answers = read_answers(path, flags)
    data: DataLook | None = None
    if answers.data is not None:
        with Display(as_json) as display:
            data = look_at(answers.data, display.progress)
    costs = compare_costs(read_prices(asked.prices), _use(answers, data, asked))
    if asked.html is not None:
        from tunesmith.pages.cost import cost_page

        try:
            write_text(asked.html, cost_page(costs.as_json()))
        except OSError as error:
            raise InputError(
                f"the page cannot be written: {error.strerror}",
                where=asked.html,
                fix="name a file in another directory",
            ) from error
    if as_json:
        out(json.dumps(costs.as_json(), ensure_ascii=False))
        return
    _show_costs(costs)
    if Situation(answers, data).facts_move:
        out("\nThese facts change: a model that holds them is out of date between two trainings, whatever it costs.")
    if asked.html is not None:
        out(f"page: {asked.html}")


def _use(answers: Answers, data: DataLook | None, asked: CostQuestion) -> Use:
    usual = Use()
    every = answers.knowledge_changes
    prompt, answer = usual.prompt, usual.answer
    if data is not None and not data.is_text:
        prompt, answer = round(data.median_prompt * 1.33), round(data.median_answer * 1.33)
    return Use(
        usual.queries if asked.queries is None else asked.queries,
        usual.months if asked.months is None else asked.months,
        prompt=prompt if answers.prompt_tokens is None else answers.prompt_tokens,
        answer=answer,
        retrain_months=usual.retrain_months if every is None else MONTHS_BETWEEN[every],
    )


def _show_costs(costs: Costs) -> None:
    console = Console()
    currency = costs.prices.currency
    rows = [[line.name, f"{line.rag:,.2f}", f"{line.tuned:,.2f}"] for line in costs.lines]
    total = ["total", f"{costs.rag:,.2f}", f"{costs.tuned:,.2f}"]
    if console.is_terminal:
        table = Table(show_edge=False, pad_edge=False)
        table.add_column(f"over {costs.use.months} months, {currency}")
        table.add_column("retrieval", justify="right")
        table.add_column("tuning", justify="right")
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total, style="bold")
        console.print(table)
    else:
        names = [f"over {costs.use.months} months, {currency}", "retrieval", "tuning"]
        out("\n".join(aligned([names, *rows, total], right={1, 2})))
    out(f"\n{costs.sentence}")
    if costs.crossing is not None:
        out(f"The one that begins dearer is the cheaper one by the end of month {costs.crossing}.")
    out(f"Prices of {costs.prices.date}: {costs.prices.source}")
