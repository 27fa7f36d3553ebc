"""A smaller student learns from the demo model: every way of distilling against plain fine-tuning, at the same steps.

    python bench/distill.py DATA [--part students] [--part prompt] [--ways 6] [--quick] [--write]

DATA holds `sql_wikisql_mlx`. The student is the demo model with every second of its blocks left out, which can say
nothing sensible before it is trained. The teacher is the whole demo model, tuned on the same rows. `--part prompt` lets
the demo model behind a long prompt with worked examples teach itself to do without it. Runs that are finished stay in
`runs/distill`, so that the command goes on where it stopped; `--write` puts what is there into
`docs/results/distill.md`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.base import silent
from tunesmith.evaluation.answers import mean_nll
from tunesmith.models.demo import demo_model
from tunesmith.models.load import load_model, load_tokenizer
from tunesmith.pipeline.distilling import with_teacher
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import load
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

WORK, OUT = Path("runs/distill"), Path("docs/results/distill.md")


@dataclass(frozen=True)
class Size:
    """How many rows of each file are used, and how long students are trained on them."""

    train: int = 400
    valid: int = 48
    test: int = 32
    steps: int = 25
    batch_size: int = 16
    rate: float = 3e-4

    def trained(self, rate: float) -> dict[str, Any]:
        lengths = {"steps": self.steps, "batch_size": self.batch_size, "checkpoint_every": self.steps}
        return {**lengths, "learning_rate": rate, "evaluate_every": -(-self.steps // 4)}

    def judged(self) -> dict[str, Any]:
        metrics = {"metrics": ["rougeL", "exact_match"], "forgetting": "off", "samples": 0}
        return {**metrics, "rows": self.test, "max_new_tokens": 40, "batch_size": 32}

    def rows(self, data: Path, train: int) -> dict[str, Any]:
        """The `data` section of a recipe, whose files hold some of the rows."""
        files = {}
        for name, count in (("train", train), ("valid", self.valid), ("test", self.test)):
            lines = (data / "sql_wikisql_mlx" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            files[name] = WORK / f"{name}-{count}.jsonl"
            files[name].parent.mkdir(parents=True, exist_ok=True)
            files[name].write_text("".join(f"{line}\n" for line in lines[:: len(lines) // count][:count]))
        paths = {"train": str(files["train"]), "validation": str(files["valid"]), "test": str(files["test"])}
        return {**paths, "checks": False, "duplicates": "keep", "overlap": "keep", "answer_after": "\nA: "}


QUICK = Size(160, 24, 24, 20, 8)
WAYS: dict[str, dict[str, Any]] = {
    "the rows' answers alone": {"kind": "sft"},
    "forward KL": {"divergence": "forward-kl"},
    "the teacher's answers alone": {"answers": "teacher", "weight": 0},
    "half forward KL, half the rows' answers": {"weight": 0.5},
    "reverse KL": {"divergence": "reverse-kl"},
    "forward KL, half of the steps on its own answers": {"on_policy": 0.5, "max_new_tokens": 40},
}
EXAMPLES = 5
"""Worked examples in the long prompt."""
HEAD = """# Distillation

Written by `python bench/distill.py DATA{options} --write`: text to SQL (`sql_wikisql_mlx`), two cores without a GPU,
bf16, one seed.{caveat}
"""
CAVEAT = " A first look: few rows and steps; what another seed would change was not measured."


def smaller(base: Path, directory: Path) -> Path:
    """The model with every second block left out; the first and the last stay."""
    if not (directory / "config.json").is_file():
        model: Any = load_model(str(base), dtype=torch.bfloat16, device=torch.device("cpu"))
        count = model.config.num_hidden_layers
        kept = torch.linspace(0, count - 1, count // 2).round().int().tolist()
        model.model.layers = torch.nn.ModuleList([model.model.layers[at] for at in kept])
        for at, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = at
        model.config.num_hidden_layers = len(kept)
        load_tokenizer(str(base)).save_pretrained(directory)
        model.save_pretrained(directory)
    return directory


def done(name: str, values: dict[str, Any]) -> Run:
    path = WORK / name
    if not (path / "report.json").is_file():
        print(f"{name} …", flush=True)
        recipe = check_recipe({**values, "output": str(path)}, name)
        return finetune(recipe, resume=(path / "recipe.yaml").is_file())
    return Run.open(path)


def students(data: Path, size: Size, ways: int) -> None:
    rows = size.rows(data, size.train)
    tuned = {"model": "demo", "data": rows, "method": "lora", "evaluate": size.judged()}
    done("teacher", {**tuned, "train": size.trained(1e-3)})
    student = smaller(demo_model(), WORK / "student")
    common = {"model": str(student), "data": rows, "method": "full", "train": size.trained(size.rate)}
    common["evaluate"] = size.judged()
    for name, way in list(WAYS.items())[:ways]:
        learned = way if "kind" in way else {"kind": "distill", "teacher": str(WORK / "teacher"), **way}
        done(slug(name), {**common, "objective": learned})
    # What is compared is the same for all: the divergence from the teacher on the same rows, none trained on.
    objective = {"kind": "distill", "teacher": str(WORK / "teacher")}
    recipe = check_recipe({**common, "objective": objective, "output": str(WORK / "none")}, "measured")
    planned = with_teacher(plan_job(recipe), silent)
    assert planned.prepared is not None
    examples = [row.example for row in planned.prepared.validation]
    trained = {name: WORK / slug(name) / "model" for name in list(WAYS)[:ways]}
    for name, path in {"": student, **trained}.items():
        kept = WORK / f"{slug(name) or 'before'}.kl.json"
        if not kept.is_file():
            model = load(path, dtype="fp32")
            kept.write_text(json.dumps(mean_nll(model, examples, packed=True, objective=planned.objective)))


def prompt(data: Path, size: Size) -> None:
    lines = (data / "sql_wikisql_mlx" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    shown = [json.loads(line)["text"] for line in lines[7 :: len(lines) // EXAMPLES][:EXAMPLES]]
    text = "You translate questions about a table into SQL. Write the query alone. Examples:\n\n" + "\n\n".join(shown)
    values = {"model": "demo", "data": size.rows(data, size.train // 2), "method": "lora", "evaluate": size.judged()}
    learned = {"kind": "distill", "teacher_prompt": text}
    done("prompt", {**values, "train": size.trained(1e-3), "objective": learned})


def slug(name: str) -> str:
    return "-".join(name.replace("'", "").replace(",", "").lower().split())


def figures(run: Run) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in (run.report or {})["metrics"]}


def table_of_students(size: Size) -> list[str]:
    teacher, before = figures(Run.open(WORK / "teacher")), json.loads((WORK / "before.kl.json").read_text())
    lines = [
        "## A student of half the blocks",
        "",
        "The student is the demo model without every second block (81 M of 135 M weights), all of it trained for "
        f"{size.steps} steps of {size.batch_size} rows at {size.rate:g}. The teacher is the demo model, tuned on the "
        "same rows with LoRA. KL is KL(teacher || student) in nats a token of the answers of "
        f"{size.valid} validation rows, over the teacher's 64 likeliest tokens and the rest; the other columns are "
        f"{size.test} test rows, with the 95 % paired interval of the gain over the untrained student.",
        "",
        "| trained on | KL to the teacher | rougeL | gain | exact match | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    first = figures(Run.open(WORK / slug(next(iter(WAYS)))))
    cells = [f"{first[name]['base']:.3f}" for name in ("rougeL", "exact_match", "perplexity")]
    lines.append(f"| nothing | {before:.3f} | {cells[0]} | | {cells[1]} | {cells[2]} | |")
    for name in WAYS:
        if not (WORK / f"{slug(name)}.kl.json").is_file():
            continue
        run = Run.open(WORK / slug(name))
        found, kl = figures(run), json.loads((WORK / f"{slug(name)}.kl.json").read_text())
        gain, seconds = found["rougeL"], (run.report or {})["measured"]["train_seconds"]
        lines.append(
            f"| {name} | {kl:.3f} | {gain['tuned']:.3f} | {gain['difference']:+.3f} ({gain['low']:+.3f} … "
            f"{gain['high']:+.3f}) | {found['exact_match']['tuned']:.3f} | {found['perplexity']['tuned']:.3f} | "
            f"{seconds:.0f} |"
        )
    cells = [f"{teacher[name]['tuned']:.3f}" for name in ("rougeL", "exact_match", "perplexity")]
    lines.append(f"| (the teacher) | 0 | {cells[0]} | | {cells[1]} | {cells[2]} | |")
    curve = [e for e in Run.open(WORK / slug("forward KL")).events() if e["event"] == "validation"]
    steps = ", ".join(f"{e['loss']:.3f} after {e['step']}" for e in curve)
    return [*lines, "", f"Held-out KL while it learns (forward KL): {before:.3f} before, {steps} steps."]


def table_of_prompt(size: Size) -> list[str]:
    run = Run.open(WORK / "prompt")
    found, report = figures(run), run.report or {}
    lines = [
        "",
        "## A prompt that is no longer needed",
        "",
        f"The demo model behind an instruction and {EXAMPLES} worked examples teaches itself, with LoRA, to answer "
        f"without them, from {size.train // 2} rows; nothing else is learned from the rows (weight 1).",
        "",
        "| test rows | without the prompt | with it | tuned, without it | gain over the first |",
        "|---|---|---|---|---|",
    ]
    for entry in report["prompted"]:
        own = found[entry["name"]]
        lines.append(
            f"| {entry['name']} | {own['base']:.3f} | {entry['value']:.3f} | {own['tuned']:.3f} | "
            f"{own['difference']:+.3f} ({own['low']:+.3f} … {own['high']:+.3f}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--part", action="append", choices=["students", "prompt"])
    parser.add_argument("--ways", type=int, default=len(WAYS), help="how many of the ways, the first ones")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps")
    given = parser.parse_args()
    size = QUICK if given.quick else Size()
    if given.part is None or "students" in given.part:
        students(given.data, size, given.ways)
    if given.part is None or "prompt" in given.part:
        prompt(given.data, size)
    parts = [(WORK / "before.kl.json", table_of_students), (WORK / "prompt" / "report.json", table_of_prompt)]
    head = HEAD.format(options=" --quick" if given.quick else "", caveat=CAVEAT if given.quick else "")
    text = "\n".join([head, *(line for file, table in parts if file.is_file() for line in table(size))]) + "\n"
    print(text)
    if given.write:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
