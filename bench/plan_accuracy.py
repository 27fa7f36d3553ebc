"""What `tunesmith plan` predicts beside what a job then needs: peak memory and time, each job in a fresh process.

    python bench/plan_accuracy.py --repeat 5 [--write docs/results/plan-accuracy.md] [--only NAME] [--work DIRECTORY]

Fifteen jobs: full, LoRA and QLoRA, with and without checkpointing, short and long rows, one to sixteen rows at a time,
fp32 and bf16, and a random Llama of 60 M parameters that no constant was fitted on. The plan is made by `tunesmith
plan --calibrate`, the job is done by `tunesmith train`; peaks are the operating system's own count for the whole
process. With `--repeat`, every job is planned and done so many times, in rounds over all of them, and medians stand in
the table: a machine that others use too is faster at one minute than at the next, which a single plan before a single
job cannot tell from a wrong plan. Results are kept in DIRECTORY, so that an interrupted run goes on where it was;
`--plans` makes the plans anew for jobs that were done before. About twenty minutes a round on two idle cores; nothing
else should run, for times are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tunesmith.data.stdlib_docstrings import write_demo_data

MEMORY_BOUND, TIME_BOUND = 0.10, 0.20
TOGETHER = 8
"""Rows of the demo data that make one long row."""
JOBS: dict[str, dict[str, Any]] = {
    "lora, 8 rows": {},
    "lora, 16 rows": {"train": {"batch_size": 16}},
    "lora, 1 row at a time": {"train": {"batch_size": 8, "micro_batch": 1}},
    "lora, checkpointing": {"train": {"batch_size": 16, "gradient_checkpointing": True}},
    "lora, long rows": {"data": {"train": "long.jsonl"}, "train": {"batch_size": 4}},
    "lora, long rows, checkpointing": {
        "data": {"train": "long.jsonl"},
        "train": {"batch_size": 4, "gradient_checkpointing": True},
    },
    "lora on q and v, rank 64": {"method": {"kind": "lora", "rank": 64, "targets": "qv"}},
    "lora, fp32": {"train": {"dtype": "fp32"}},
    "qlora": {"method": {"kind": "qlora"}},
    "full": {"method": {"kind": "full"}},
    "full, checkpointing": {"method": {"kind": "full"}, "train": {"gradient_checkpointing": True}},
    "lora, answers judged": {
        "train": {"batch_size": 4},
        "evaluate": {"metrics": ["rougeL"], "max_new_tokens": 32, "rows": 32},
    },
    "lora, 32 steps, answers judged": {
        "train": {"batch_size": 16, "steps": 32},
        "evaluate": {"metrics": ["rougeL"], "max_new_tokens": 40, "rows": 64},
    },
    "another model, lora": {"model": "llama60m"},
    "another model, full": {"model": "llama60m", "method": {"kind": "full"}},
}


def recipe_of(name: str, place: Path, steps: int) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "model": "demo",
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 1024, "overlong": "truncate"},
        "method": {"kind": "lora"},
        "train": {"steps": steps, "batch_size": 8, "evaluate_every": "off", "checkpoint_every": steps},
        "evaluate": {"rows": 32, "metrics": ["perplexity"], "forgetting": "off"},
        "output": str(place / "runs" / short_name(name)),
    }
    for key, value in JOBS[name].items():
        whole = isinstance(value, dict) and key != "method"
        recipe[key] = {**recipe[key], **value} if whole else value
    for part in ("train", "test"):
        recipe["data"][part] = str(place / "data" / recipe["data"][part])
    if recipe["model"] != "demo":
        recipe["model"] = str(place / recipe["model"])
    return recipe


def short_name(name: str) -> str:
    return "-".join(name.replace(",", "").split())


def make_inputs(place: Path) -> None:
    """Rows, long rows made of them, and the other model."""
    data = place / "data"
    write_demo_data(data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    with (data / "long.jsonl").open("w", encoding="utf-8") as file:
        for at in range(0, 400, TOGETHER):
            prompt = "\n\n".join(row["prompt"] for row in rows[at : at + TOGETHER])
            file.write(json.dumps({**rows[at], "prompt": prompt}) + "\n")
    if not (place / "llama60m").is_dir():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from tunesmith.models.demo import demo_model

        tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
        config = AutoConfig.for_model(
            "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=len(tokenizer), tie_word_embeddings=True,
            max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "llama60m")
        tokenizer.save_pretrained(place / "llama60m")


def planned(path: Path) -> dict[str, Any]:
    """What the plan of a recipe says, made in a process of its own."""
    os.sync()  # what the last job wrote would otherwise be on its way to the disk while writing is timed
    command = [sys.executable, "-m", "tunesmith", "plan", str(path), "--calibrate", "--json"]
    plan = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {
        "predicted_peak": plan["memory"]["peak_bytes"],
        "phase": plan["memory"]["peak_phase"],
        "predicted_train": plan["time"]["train_seconds"],
        "predicted_evaluate": plan["time"]["evaluate_seconds"],
        "calibration": plan["time"]["measured_in_seconds"],
        "timed": plan["time"]["source"].startswith("blocks"),
    }


def measured(name: str, place: Path, steps: int) -> dict[str, Any]:
    """Plans and does a job, each in a process of its own."""
    path = place / f"{short_name(name)}.yaml"
    path.write_text(yaml.safe_dump(recipe_of(name, place, steps)), encoding="utf-8")
    plan, output = planned(path), place / "runs" / short_name(name)
    if output.is_dir():
        shutil.rmtree(output)
    command = [sys.executable, "-m", "tunesmith", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status not in (0, 3 << 8):
        raise SystemExit(f"{path} failed: tunesmith train {path}")
    report = json.loads((output / "report.json").read_text())
    return {
        "name": name,
        "peak": usage.ru_maxrss * 1024,
        "train": report["measured"]["train_seconds"],
        "evaluate": report["measured"]["evaluate_seconds"],
        **plan,
    }


def page(found: dict[str, list[dict[str, Any]]], steps: int, command: str) -> str:
    """The table: a row for each job, by the medians of the times that it was planned and done.

    Args:
        found: what each job's rounds predicted and measured.
        command: what makes the table.
    """
    rounds = max(map(len, found.values()))
    lines = [
        "# Plans beside what jobs needed",
        "",
        f"`{command}`: {steps} steps each where the job says nothing else, SmolLM2-135M and, at "
        f"the end, a random Llama of 60 M parameters, {os.cpu_count()} cores. Every job was planned and done "
        f"{rounds} times, in rounds over all jobs; medians, and in brackets the least and the most. Peaks are of the "
        "whole process, as the operating system counts them; times are of training and of judging, predicted after the "
        "calibration of `plan --calibrate`. MB are 10^6 bytes.",
        "",
        "| job | peak MB | predicted | off | in phase | training s | predicted | off | judging s | predicted | "
        "both off | calibration s |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, ones in found.items():
        memory, train, evaluate = _peak(ones), _times(ones, "train"), _times(ones, "evaluate")
        lines.append(
            f"| {name} | {_spread(memory[0], 1e6)} | {_spread(memory[1], 1e6)} | {_off(*memory):+.1%} "
            f"| {ones[0]['phase']} | {_spread(train[0])} | {_spread(train[1])} | {_off(*train):+.1%} "
            f"| {_spread(evaluate[0])} | {_spread(evaluate[1])} | {_off(*_both(ones)):+.1%} "
            f"| {median(one['calibration'] for one in ones):.1f} |"
        )
    jobs = list(found.values())
    lines += [
        "",
        f"By medians of {len(jobs)} jobs: memory within {MEMORY_BOUND:.0%}: {_within(jobs, _peak, MEMORY_BOUND)}; "
        f"time of training within {TIME_BOUND:.0%}: {_within(jobs, partial(_times, part='train'), TIME_BOUND)}, of "
        f"training and judging together {_within(jobs, _both, TIME_BOUND)}.",
    ]
    if rounds > 1:
        alone = [[one] for ones in jobs for one in ones]
        lines += [
            "",
            f"Of {len(alone)} single plans beside the single job that followed: memory "
            f"{_within(alone, _peak, MEMORY_BOUND)}; training "
            f"{_within(alone, partial(_times, part='train'), TIME_BOUND)}, together "
            f"{_within(alone, _both, TIME_BOUND)}. One and the same job took up to "
            f"{max(max(took) / min(took) for took, _ in map(partial(_times, part='train'), jobs)) - 1:.0%} longer to "
            "train in one round than in another.",
        ]
    return "\n".join(lines) + "\n"


Pair = tuple[list[float], list[float]]
"""What was measured, and what was predicted, in each round."""


def _peak(ones: list[dict[str, Any]]) -> Pair:
    return [one["peak"] for one in ones], [one["predicted_peak"] for one in ones]


def _times(ones: list[dict[str, Any]], part: str) -> Pair:
    return [one[part] for one in ones], [one[f"predicted_{part}"] for one in ones]


def _both(ones: list[dict[str, Any]]) -> Pair:
    parts = _times(ones, "train"), _times(ones, "evaluate")
    took, predicted = ([a + b for a, b in zip(*sides, strict=True)] for sides in zip(*parts, strict=True))
    return took, predicted


def _off(took: list[float], predicted: list[float]) -> float:
    return median(predicted) / max(1e-9, median(took)) - 1


def _within(jobs: list[list[dict[str, Any]]], pair: Callable[[list[dict[str, Any]]], Pair], bound: float) -> int:
    return sum(abs(_off(*pair(ones))) <= bound for ones in jobs)


def _spread(values: list[float], unit: float = 1.0) -> str:
    shown = "{:,.0f}" if unit > 1 else "{:.1f}"
    middle, least, most = (shown.format(value / unit) for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of jobs, with commas between them", default="")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="rounds in which every job is planned and done")
    parser.add_argument("--work", type=Path, default=Path("runs/plan-accuracy"))
    parser.add_argument("--plans", action="store_true", help="plan again what was done before")
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    place = asked.work.resolve()
    place.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_inputs(place)
    wanted = [name for name in JOBS if not asked.only or short_name(name) in asked.only.split(",")]
    found = {name: list[dict[str, Any]]() for name in wanted}
    for round_ in range(1, asked.repeat + 1):
        for name in wanted:
            kept = place / f"{short_name(name)}-{round_}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(measured(name, place, asked.steps)), encoding="utf-8")
            elif asked.plans:
                again = planned(place / f"{short_name(name)}.yaml")
                kept.write_text(json.dumps({**json.loads(kept.read_text(encoding="utf-8")), **again}), encoding="utf-8")
            found[name].append(json.loads(kept.read_text(encoding="utf-8")))
            print(found[name][-1], flush=True)
    only = f" --only {asked.only}" if asked.only else ""
    text = page(found, asked.steps, f"python bench/plan_accuracy.py --repeat {asked.repeat}{only}")
    print(text)
    if asked.write:
        asked.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
