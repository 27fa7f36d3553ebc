"""The verbs; those below `data`, `recipe` and `runs` have files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tunesmith.cli.advise_verb import AdviseOptions, advise
from tunesmith.cli.arguments import AsJson, Overrides, RecipePath, Target
from tunesmith.cli.data_verbs import data_app
from tunesmith.cli.importing import importing
from tunesmith.cli.options import as_command
from tunesmith.cli.recipe_verbs import recipe_app
from tunesmith.cli.runs_verbs import runs_app
from tunesmith.cli.vote_verb import vote

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's markdown alone takes a tenth of a second
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(runs_app, name="runs")
app.command()(as_command(AdviseOptions, advise))
app.command()(vote)


def _print_version(asked: bool) -> None:
    if asked:
        from tunesmith import __version__

        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt a language model to a task, and prove that it is better."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output directory.")] = False,
    force: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: go on although this setting is another now.", metavar="KEY=VALUE"),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train this many times, each with another seed, and judge them together.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Do the whole job: plan, train, prove; ends with a verdict and a page."""
    with importing():
        from tunesmith.cli.train import run_seeds, run_training

    if seeds > 1:
        raise typer.Exit(run_seeds(recipe, overrides or [], seeds, resume=resume, force=force or [], as_json=as_json))
    raise typer.Exit(run_training(recipe, overrides or [], resume=resume, force=force or [], as_json=as_json))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    table: Annotated[bool, typer.Option("--table", help="What fits where: methods on a table of machines.")] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="The best plan inside memory=8GB, time=2h or money=5.", metavar="LIMIT=VALUE"),
    ] = None,
    machines: Annotated[Path | None, typer.Option(help="A table of machines and prices of your own (YAML).")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure one dry step with the largest micro-batch.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time this model's own blocks for some seconds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a job will need, and what every `auto` becomes, before anything is loaded."""
    with importing():
        from tunesmith.cli.plan import Asked, show_plan
        from tunesmith.cli.stages import read_stage, show_stage_plans
        from tunesmith.recipe_stages import StagedRecipe, read_job

    asked = Asked(table, tuple(budget or ()), machines, probe, calibrate)
    job = read_job(recipe, overrides or [])
    if isinstance(job, StagedRecipe) and asked == Asked():
        show_stage_plans(job, as_json=as_json)
        return
    show_plan(read_stage(recipe, overrides or [], None), asked, as_json=as_json)


@app.command()
def evaluate(
    target: Target,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to judge on; may be given several times.")
    ] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="May be given several times.")] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="At most this many rows of each file, drawn from all of it.")
    ] = 200,
    benchmarks: Annotated[
        str | None, typer.Option("--benchmarks", help="lm-eval's names, for example hellaswag,mmlu,arc_easy.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many items of each task.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Worked examples before each item.")] = None,
    benchmark_data: Annotated[
        str | None, typer.Option("--benchmark-data", help="A directory with the items, or hub.")
    ] = None,
    memorisation: Annotated[
        bool, typer.Option("--memorisation", help="Of a run: which training answers come back from their prompts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge a model on rows or on benchmarks; a run or adapter is compared with its base."""
    with importing():
        from tunesmith.cli.benchmarks import run_benchmark_evaluation
        from tunesmith.cli.evaluate import run_evaluation, run_probe

    asked = {"--limit": limit, "--shots": shots, "--benchmark-data": benchmark_data}
    named = [name.strip() for name in (benchmarks or "").split(",") if name.strip()]
    if memorisation:
        run_probe(target, rows=rows, as_json=as_json)
    if data or not (named or memorisation):
        only = asked if not named else {}
        run_evaluation(target, data or [], metrics=metrics, rows=rows, as_json=as_json, only=only)
    if named:
        run_benchmark_evaluation(target, named, limit=limit, shots=shots, data=benchmark_data, as_json=as_json)


@app.command()
def generate(
    target: Target,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT…")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    system: Annotated[str | None, typer.Option(help="A system turn before the prompt.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Texts or rows to look up; what fits the prompt is put before it.")
    ] = None,
    retrieval: Annotated[
        Literal["bm25", "dense", "hybrid"] | None, typer.Option(help="With --corpus: what finds it; else bm25.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts."""
    with importing():
        from tunesmith.cli.speak import Search, print_answers
        from tunesmith.engine.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p)
    search = Search.asked(corpus, retrieval)
    print_answers(target, prompts, sampling, system=system, search=search, as_json=as_json)


@app.command()
def chat(
    target: Target,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    system: Annotated[str | None, typer.Option(help="A system turn before the conversation.")] = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends."""
    with importing():
        from tunesmith.cli.speak import converse
        from tunesmith.engine.generate import Sampling

    converse(target, Sampling(max_new_tokens, temperature), system=system)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A run, or an adapter's directory.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the merged model.")],
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, and show that nothing changed."""
    with importing():
        from tunesmith.cli.display import Display, quiet_libraries
        from tunesmith.cli.display import out as say
        from tunesmith.pipeline.merging import merge_run

    quiet_libraries()
    with Display(as_json) as display:
        merged = merge_run(run, out, progress=display.progress)
    check = merged.check
    if as_json:
        say(json.dumps({**merged.as_json(), "out": str(out)}))
        return
    say(f"merged {check.layers} layers into {out}")
    say(
        f"against the adapter on {check.prompts} held-out prompts: {check.same_tokens:.1%} of {merged.compared} the "
        f"same, mean KL {check.mean_kl:.2g} nats, largest logit difference {check.largest_logit_difference:.3g}"
    )
    say(f"against the base: mean KL {check.differs_from_base:.2g} nats, so it is not the base")
    if merged.note:
        say(merged.note)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A model's directory, a hub id, or a fully tuned run.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the quantized model.")],
    to: Annotated[str, typer.Option(help="nf4, fp4 or int8.")] = "nf4",
    double: Annotated[bool, typer.Option(help="Quantize the scales of 4-bit blocks too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Save a model with its linear layers in 4 or 8 bits, as a base that is loaded so (bitsandbytes)."""
    with importing():
        from tunesmith.cli.display import Display, quiet_libraries
        from tunesmith.cli.display import out as say
        from tunesmith.pipeline.quantizing import quantize_model

    quiet_libraries()
    with Display(as_json) as display:
        saved = quantize_model(model, out, to, double=double, progress=display.progress)
    sizes = f"{saved.bytes_before / 2**20:.0f} MB to {saved.bytes_after / 2**20:.0f} MB"
    say(json.dumps(saved.as_json()) if as_json else f"saved {out} in {saved.quantized}: {sizes}")


@app.command()
def rerun(
    run: Annotated[Path, typer.Argument(help="The run whose recipe is trained again.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted rerun.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a run's recipe again, on a new base or new data, and compare the two runs."""
    with importing():
        from tunesmith.cli.runs import run_again

    raise typer.Exit(run_again(run, overrides or [], resume=resume, as_json=as_json))


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs; the first is what the others are compared with.", metavar="RUN…"),
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page too.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many rows with all answers are printed.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the held-out rows that they share: settings, metrics, answers; seeds of one job are one."""
    with importing():
        from tunesmith.cli.compare import run_comparison

    run_comparison(runs, html=html, samples=samples, as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, and whether the demo model is here (it is fetched if need be)."""
    from tunesmith.cli.display import Display, out, quiet_libraries
    from tunesmith.models.demo import demo_model
    from tunesmith.pipeline.environment import describe_environment

    quiet_libraries()
    facts: dict[str, Any] = describe_environment()
    with Display(as_json) as display:
        facts["demo_model"] = str(demo_model(display.progress))
    if as_json:
        out(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name == "versions":
            for package, version in value.items():
                out(f"{package}: {version or 'not installed'}")
        elif name != "command":
            out(f"{name.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"), as_json: AsJson = False
) -> None:
    """The main job on the demo model: docstrings of Python's own library in one sentence."""
    with importing():
        from tunesmith.cli.train import run_demo

    raise typer.Exit(run_demo(output, as_json=as_json))
