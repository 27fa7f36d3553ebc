"""The verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tunesmith.cli.advise_verb import AdviseOptions, advise
from tunesmith.cli.importing import importing
from tunesmith.cli.options import as_command
from tunesmith.cli.vote_verb import vote

app = typer.Typer(
    help="Adapt a language model to a task, and prove that it is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's markdown alone takes a tenth of a second
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data as the model will see it.", no_args_is_help=True, rich_markup_mode=None)
recipe_app = typer.Typer(
    help="The format of recipes, and recipes from other tools.", invoke_without_command=True, rich_markup_mode=None
)
runs_app = typer.Typer(
    help="List runs, each below the one that it comes from, with their verdicts.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(runs_app, name="runs")
app.command()(as_command(AdviseOptions, advise))
app.command()(vote)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings over the recipe's, such as train.steps=100.", metavar="KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Target = Annotated[str, typer.Argument(help="A run, an adapter's directory, a model's directory, or a hub id.")]


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


@app.command()
def evaluate(
    target: Target,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to judge on; may be given several times.")
    ] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="May be given several times.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="At most this many rows of each file.")] = 200,
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
