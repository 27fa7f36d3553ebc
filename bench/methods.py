"""Every method on the same tasks: text-to-SQL and one-sentence summaries with the demo model, banking77 with MiniLM.

    python bench/methods.py DATA [--encoder DIRECTORY] [--task sql] [--method lora] [--write]

DATA holds `sql_wikisql_mlx`, `sum_scitldr` and `cls_banking77`. Every method gets the same steps and rows. A learning
rate is chosen for each from three, on validation loss in a shorter run; then each trains with two seeds and is judged
on the test rows. What is finished stays in `runs/methods`, so that the command goes on where it stopped; `--write` puts
its rows into the tables of `docs/results/methods.md` and leaves the others there as they are.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.base import silent
from tunesmith.files import write_text
from tunesmith.models.minilm import minilm_model
from tunesmith.pipeline.loaded import load
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.proof import Proof
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

WORK = Path("runs/methods")
OUT = Path("docs/results/methods.md")
SEEDS = (1, 2)
ADAPTERS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"kind": "full"}, 1e-4),
    "full, biases and norms": ({"kind": "full", "weights": [r".*([nN]orm|bias).*"]}, 3e-3),
    "head": ({"kind": "head"}, 1e-3),
    "lora": ({"kind": "lora"}, 1e-3),
    "lora, rslora": ({"kind": "lora", "rslora": True}, 3e-4),
    "lora, LoRA+": ({"kind": "lora", "plus_ratio": 4}, 5e-4),
    "lora, dora": ({"kind": "lora", "dora": True}, 1e-3),
    "lora, pissa": ({"kind": "lora", "init": "pissa"}, 3e-4),
    "qlora": ({"kind": "qlora"}, 1e-3),
    "adapter, houlsby": ({"kind": "adapter"}, 1e-3),
    "adapter, pfeiffer": ({"kind": "adapter", "placement": "pfeiffer"}, 1e-3),
    "adapter, parallel": ({"kind": "adapter", "placement": "parallel"}, 1e-3),
    "prefix": ({"kind": "prefix"}, 3e-3),
    "prompt": ({"kind": "prompt"}, 3e-3),
    "ia3": ({"kind": "ia3"}, 1e-2),
    "peft, loha": ({"kind": "peft", "type": "loha", "r": 8, "target_modules": "all-linear"}, 1e-3),
}
"""Settings of each method, and the middle of its three learning rates."""
VARIANTS = (
    *("full, biases and norms", "lora, rslora", "lora, LoRA+", "lora, dora", "lora, pissa"),
    *("adapter, pfeiffer", "adapter, parallel"),
)
FACTORS = (0.3, 1.0, 3.0)
FURTHER = 2


@dataclass(frozen=True)
class Task:
    """One task: a recipe without method, and which methods make sense on it.

    Learning rates are searched for in `search_steps`, or are those of another task with the same model (`rates_of`).
    `rates` names others, where those diverge.
    """

    recipe: dict[str, Any]
    metric: str
    search_steps: int = 0
    rates_of: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def tasks(data: Path, encoder: str) -> dict[str, Task]:
    sql, summaries, banking = data / "sql_wikisql_mlx", data / "sum_scitldr", data / "cls_banking77"
    off = {"checks": False, "duplicates": "keep", "overlap": "keep"}
    asked = {"evaluate_every": "off", "checkpoint_every": "off"}
    return {
        "sql": Task(
            {
                "model": "demo",
                "data": {
                    **off,
                    "train": str(sql / "train.jsonl"),
                    "validation": 0.03,
                    "test": str(sql / "test.jsonl"),
                    "answer_after": "\nA: ",
                },
                "train": {"steps": 32, "batch_size": 4, **asked},
                "evaluate": {"rows": 64, "metrics": ["exact_match", "rougeL"], "samples": 0},
            },
            "exact_match",
            8,
            left_out={
                "lora, rslora": "at one rank it is lora with another alpha",
                **dict.fromkeys(("adapter, pfeiffer", "adapter, parallel"), "a variant; on banking77 only"),
            },
        ),
        "summaries": Task(
            {
                "model": "demo",
                "data": {
                    **off,
                    "train": str(summaries / "train.jsonl"),
                    "validation": 0.01,
                    "test": str(summaries / "test.jsonl"),
                    "columns": {"prompt": "Summarise in one sentence: {document}", "completion": "summaries"},
                    "max_length": 384,
                    "overlong": "drop",
                },
                "train": {"steps": 24, "batch_size": 2, **asked},
                "evaluate": {"rows": 32, "metrics": ["rougeL"], "max_new_tokens": 48, "samples": 0},
            },
            "rougeL",
            rates_of="sql",
            rates={"head": 3e-4},
            left_out=dict.fromkeys(VARIANTS, "a variant"),
        ),
        "banking77": Task(
            {
                "model": encoder,
                "data": {
                    **off,
                    "train": str(banking / "train.csv"),
                    "test": str(banking / "test.csv"),
                    "validation": 0.03,
                },
                "objective": {"kind": "classify"},
                "train": {"steps": 80, "batch_size": 32, **asked},
                "evaluate": {"rows": 1500, "samples": 0},
            },
            "accuracy",
            20,
            left_out={
                **dict.fromkeys(("prefix", "prompt"), "keeps no head"),
                "lora, rslora": "at one rank it is lora with another alpha",
                "qlora": "a model of 45 MB",
            },
        ),
    }


def finished(name: str, recipe: dict[str, Any]) -> Run:
    """The run of a recipe, trained now in a process of its own unless it is there."""
    output, path = WORK / name, WORK / f"{name}.yaml"
    text = json.dumps({**recipe, "output": str(output)})
    if path.is_file() and path.read_text(encoding="utf-8") != text:  # of another rate, or another size of the task
        shutil.rmtree(output, ignore_errors=True)
        (WORK / f"{name}.evidence.json").unlink(missing_ok=True)
    if not (output / "report.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "tunesmith", "train", str(path), "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{name}: exit {done.returncode}, {time.perf_counter() - started:.0f} s", flush=True)
        if done.returncode not in (0, 3):
            raise RuntimeError(done.stderr[-800:])
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        (WORK / f"{name}.seconds.json").write_text(json.dumps(seconds))
    return Run.open(output)


def evidence(name: str, task: Task, run: Run) -> dict[str, Any]:
    """What a run's report says of scores and forgetting; a model that writes is judged here, its base once a task."""
    if run.report is not None and run.report["metrics"]:
        return run.report
    kept = WORK / f"{name}.evidence.json"
    if not kept.is_file():
        proof = _proof(json.dumps(task.recipe))
        base = WORK / f"{name.split('-')[0]}-base.json"
        if not base.is_file():
            write_text(base, json.dumps(proof.evaluate(load(task.recipe["model"]), silent)))
        found = proof.compare(json.loads(base.read_text()), proof.evaluate(load(run.path), silent))
        kept.write_text(json.dumps({key: found[key] for key in ("metrics", "forgetting")}))
    return json.loads(kept.read_text())


@cache
def _proof(recipe: str) -> Proof:
    settings = check_recipe({**json.loads(recipe), "output": str(WORK / "none")}, "bench")
    assert settings.evaluate != "off"
    return Proof(plan_job(settings), settings.evaluate)


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-").replace("--", "-")


def with_method(task: Task, method: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    train = {**task.recipe["train"], "learning_rate": rate}
    return {**task.recipe, "method": method, "train": train, "seed": seed}


def best_rate(name: str, task: Task, method: dict[str, Any], middle: float) -> float:
    """The rate of the grid with the lowest validation loss in a short run; test rows are not looked at.

    Where the highest of the grid is best, higher ones are tried until one is worse, but not more than `FURTHER`.
    """
    losses: dict[float, float] = {}
    waiting = [middle * factor for factor in FACTORS]
    while waiting:
        rate = waiting.pop(0)
        recipe = with_method(task, method, rate, 0)
        recipe["train"] = {**recipe["train"], "steps": task.search_steps, "evaluate_every": task.search_steps}
        recipe["evaluate"] = "off"
        try:
            run = finished(f"{name}-rate-{rate:g}", recipe)
        except RuntimeError as error:  # a rate at which it diverges is an answer too
            print(f"{name} at {rate:g}: {str(error).strip().splitlines()[-1]}", flush=True)
            continue
        found = [event["loss"] for event in run.events() if event["event"] == "validation"]
        losses[rate] = found[-1] if found and found[-1] is not None else float("inf")
        best = min(losses, key=lambda rate: losses[rate])
        if not waiting and best == max(losses) and len(losses) < len(FACTORS) + FURTHER:
            waiting.append(3 * best)
    return min(losses, key=lambda rate: losses[rate])


def size_of(run: Run) -> int:
    result = run.result
    return 0 if result is None else sum(path.stat().st_size for path in result.glob("*.safetensors"))


def row_of(label: str, kept: dict[str, Any]) -> str:
    rate, runs = kept["rate"], [Run.open(Path(path)) for path in kept["runs"]]
    reports = [run.report or {} for run in runs]
    found = [
        json.loads(Path(path).read_text()) if path else report
        for path, report in zip(kept["evidence"], reports, strict=True)
    ]
    first = [entry["metrics"][0] for entry in found]
    score = " / ".join(f"{entry['tuned']:.3f}" for entry in first)
    gain = " / ".join(f"{entry['difference']:+.3f} ({entry['low']:+.3f} … {entry['high']:+.3f})" for entry in first)
    second = [entry["metrics"][1] for entry in found if len(entry["metrics"]) > 1]
    beside = " / ".join(f"{entry['tuned']:.3f}" for entry in second)
    changes = [entry["forgetting"].get("change") for entry in found]
    forgot = " / ".join("–" if change is None else f"{change:+.1%}" for change in changes)
    peak = max(report["measured"]["peak_bytes"] for report in reports) / 2**30
    seconds = f"{min(json.loads((WORK / f'{run.path.name}.seconds.json').read_text()) for run in runs):.0f}"
    trained = reports[0]["parameters"]["trainable"]
    cells = [label, f"{rate:.1e}", score, gain, beside, forgot, f"{trained:,}", f"{peak:.2f}", seconds]
    return f"| {' | '.join(cells)} | {size_of(runs[0]) / 2**20:.1f} |"


HEAD = """# Every method on the same tasks

Written by `python bench/methods.py DATA --write`. Every method gets the same steps and rows; its learning rate is
the best of three on validation loss in a shorter run, or of up to five where the highest was best (summaries: the
rate found on SQL, and a tenth of it for the head, which diverged with it); two seeds, side by side. The gain is over
the base on the same test rows with its 95 % paired bootstrap interval (banking77's base is the best constant answer).
Forgetting is the change of perplexity on general text. Peak memory is that of the whole process while it trains;
CPU s are the processor seconds of the quicker seed's process, loading included (banking77: with its evaluation). One
thread on a machine without a GPU (`OMP_NUM_THREADS=1`), bf16. `second` is macro-F1 on banking77, ROUGE-L on SQL and
the perplexity of the references on summaries.
"""
SURPRISES = """## What surprised, and why some rows are worse than their papers

- **banking77: the frozen trunk with a head is ahead of everything that trains the trunk.** Its features are computed
  once and its solver goes to the optimum over all 9,700 rows, where 80 steps of 32 show the others 2,560; it is also
  the quickest. It ends at the same place whatever the learning rate, for there is none.
- **banking77: full fine-tuning is behind LoRA because of its head.** A new head learns at ten times the rate of the
  trunk, and a tenth of LoRA's rate is what full fine-tuning bears: after 80 steps the head has not arrived. With
  `objective.head_rate: 100` it is level with LoRA (`bench/head_rate.py DATA --encoder DIRECTORY --steps 80
  --kinds full --rate 3e-4 --factors 10 100`). Biases and norms alone, 61,000 weights, are as good as adapters.
- **A rate chosen by a short run is too high for a long one.** The search lasts a quarter of the training, and what
  learns fastest in it is chosen. PiSSA pays most: on banking77 its first seed reaches 0.828 at a third of the rate of
  its row (`--method "lora, pissa" --rate 9e-4`), on SQL it forgets five times as much as LoRA. It trains the largest
  directions of the weights themselves, where LoRA begins at nothing.
- **SQL: nobody asked about general text while rates were chosen, and it shows.** Prefixes took the highest rate that
  was tried and are left with a fraction of what general text was to them; biases and norms, the output head, which is
  the embedding too here, and (IA)³ paid with half of it or more. Full fine-tuning at a thirtieth of LoRA's rate lost
  least of all. Look at the column before you raise a rate.
- **Prompts and prefixes need far more steps than 32.** Lester et al. 2021 train prompts for 30,000 steps, Li & Liang
  2021 prefixes for epochs over tens of thousands of rows. Here the answers' likelihood rises (the rates below
  were chosen by it) and hardly one query is exactly right.
- **A base in 4 bits takes more memory than bf16 at this size.** A model of 135 M has a fifth of its weights in the
  embedding, which stays as it is, its 16-bit file stays mapped, and bitsandbytes is imported too. What loading
  takes is in [bases in 4 bits](quantized-bases.md).
- **A head reads its trunk once, and read too much of it.** The features of all rows were computed where a plan of a few
  steps comes to few of them. Found here and mended; SQL's row was timed before.
- **Summaries: at the same rates much less is forgotten**, for they are general text, which the base already writes; and
  most methods gain about as much.
- **DoRA and LoHa run in PEFT's layers** and take 1.6 to 2.1 times the memory and the time of LoRA here, for scores
  within its interval. So is LoRA+.
"""
COLUMNS = ["method", "rate", "score", "gain", "second", "forgetting", "trained", "GiB", "CPU s", "MiB"]


def published(page: str) -> dict[tuple[str, str], str]:
    """The rows of a page by task and method."""
    rows, task = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            task = line[3:].split(":")[0]
        elif line.startswith("| ") and not line.startswith("| method"):
            rows[task, line.split(" | ")[0][2:]] = line
    return rows


def rate_of(task: str, label: str) -> float:
    """The rate that was found for a method on a task, here or for the published row."""
    found = WORK / f"{task}-{slug(label)}.json"
    if found.is_file():
        return float(json.loads(found.read_text())["rate"])
    return float(published(OUT.read_text(encoding="utf-8"))[task, label].split(" | ")[1])


def written(given: dict[str, Task]) -> str:
    parts = [HEAD]
    before = published(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    for name, task in given.items():
        rows = []
        for label in ADAPTERS:
            found = WORK / f"{name}-{slug(label)}.json"
            if found.is_file():
                kept = json.loads(found.read_text())
                note = " (quick)" if kept["quick"] else ""
                rows.append(row_of(label + note, kept))
            elif (name, label) in before:
                rows.append(before[name, label])
        if rows:
            spec = task.recipe["train"]
            parts.append(f"## {name}: {task.metric}, {spec['steps']} steps of {spec['batch_size']} rows\n")
            parts.append(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            parts.append("\n".join(rows) + "\n")
            out = [f"{label} ({why})" for label, why in task.left_out.items()]
            parts.append(f"Left out: {', '.join(out)}.\n" if out else "")
    return "\n".join([*parts, SURPRISES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", default="", help="directory of an encoder for banking77; MiniLM without")
    parser.add_argument("--task", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--rate", type=float, help="this one instead of the best; its rows are printed, not written")
    parser.add_argument("--quick", action="store_true", help="one seed, a third of the steps, rates not searched")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    asks_encoder = "banking77" in (given.task or ["banking77"])
    encoder = given.encoder or (str(minilm_model(silent)) if asks_encoder else "")
    known = tasks(given.data, encoder)
    for name in given.task or known:
        task = known[name]
        if given.quick:
            task.recipe["train"]["steps"] //= 3
        for label in given.method or ADAPTERS:
            if label in task.left_out:
                continue
            method, middle = ADAPTERS[label]
            place = f"{name}-{slug(label)}"
            if given.rate:
                rate, place = given.rate, f"{place}-at-{given.rate:g}"
            elif given.quick:
                rate = middle
            elif task.rates_of:
                rate = task.rates.get(label) or rate_of(task.rates_of, label)
            else:
                rate = best_rate(place, task, method, middle)
            seeds = SEEDS[:1] if given.quick else SEEDS
            ending = "-quick" if given.quick else ""
            kept: dict[str, Any] = {"rate": rate, "quick": given.quick, "runs": [], "evidence": []}
            for seed in seeds:
                recipe = with_method(task, method, rate, seed)
                writes = "objective" not in recipe
                if writes:
                    recipe["evaluate"] = "off"
                run = finished(f"{place}-seed-{seed}{ending}", recipe)
                evidence(run.path.name, task, run)
                kept["runs"].append(str(run.path))
                kept["evidence"].append(str(WORK / f"{run.path.name}.evidence.json") if writes else "")
            (WORK / f"{place}.json").write_text(json.dumps(kept))
            print(row_of(label, kept), flush=True)
    if given.write:
        OUT.write_text(written(known), encoding="utf-8")


if __name__ == "__main__":
    main()
