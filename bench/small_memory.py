"""SmolLM2-135M within 512 MB, and the same job with the model in memory: losses, peaks and times.

    python bench/small_memory.py [--steps 4] [--write docs/results/small-memory.md]

Each job is a fresh `tunesmith train` process on rows from Python's own library, with the same seed. Peaks are the
system's own count for the whole process (`ru_maxrss` of the process that ended), from its start to its end: reading
rows, planning, judging base and tuned, training, checkpoints and report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tunesmith.data.stdlib_docstrings import write_demo_data

BUDGET = "512MB"


def job(directory: Path, data: Path, steps: int, budget: str | None) -> dict[str, Any]:
    """Trains in a process of its own; returns losses, seconds and peak in bytes."""
    recipe = {
        "model": "demo",
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "max_length": 192,
                 "overlong": "truncate", "test": str(data / "test.jsonl")},
        "method": {"kind": "lora"},
        "train": {"steps": steps, "batch_size": 4, "learning_rate": 1e-3, "evaluate_every": "off"},
        "evaluate": {"rows": 8, "metrics": ["perplexity"], "forgetting": "off"},
        "output": str(directory),
        **({"budget": {"memory": budget}} if budget else {}),
    }  # fmt: skip
    path = directory.with_suffix(".json")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "tunesmith", "train", str(path)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{path} failed")
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    taken = [event for event in events if event["event"] == "step"]
    report = json.loads((directory / "report.json").read_text())
    return {
        "losses": [event["loss"] for event in taken],
        "seconds": [event["seconds"] for event in taken],
        "peak": usage.ru_maxrss * 1024,
        "predicted": report["predicted"]["peak_bytes"],
        "tuned": report["metrics"][0]["tuned"],
        "tokens": json.loads((directory / "plan.json").read_text())["streamed_tokens"],
    }


def page(steps: int, whole: dict[str, Any], streamed: dict[str, Any]) -> str:
    difference = max(abs(a - b) / a for a, b in zip(whole["losses"], streamed["losses"], strict=True))
    ratio = sorted(streamed["seconds"])[steps // 2] / sorted(whole["seconds"])[steps // 2]
    lines = [
        "# Block by block in a small memory",
        "",
        f"`python bench/small_memory.py --steps {steps}`: SmolLM2-135M, LoRA of rank 16 (the default) on all linear "
        "layers, 4 rows a step, one seed. Each job is a process of its own; its peak is the operating system's count "
        "from start to end, judging and checkpoints included.",
        "",
        "| | in memory | `budget.memory: 512MB` |",
        "|---|---:|---:|",
        f"| peak of the whole process (MB of 10^6 bytes) | {whole['peak'] / 1e6:.0f} | {streamed['peak'] / 1e6:.0f} |",
        f"| predicted by the plan | {whole['predicted'] / 1e6:.0f} | {streamed['predicted'] / 1e6:.0f} |",
        f"| perplexity of held-out answers | {whole['tuned']:.3f} | {streamed['tuned']:.3f} |",
        "",
        f"Largest relative difference of a step's loss: {difference:.2%}. A step takes {ratio:.1f} times as long "
        f"(medians of a run each, one after the other on a shared machine with {os.cpu_count()} cores: a rough "
        f"figure); {streamed['tokens']} tokens run through a block at a time.",
        "",
        "| step | loss in memory | loss block by block |",
        "|---:|---:|---:|",
        *(
            f"| {number} | {one:.4f} | {other:.4f} |"
            for number, (one, other) in enumerate(zip(whole["losses"], streamed["losses"], strict=True), 1)
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        write_demo_data(data)
        streamed = job(Path(place) / "streamed", data, asked.steps, BUDGET)
        whole = job(Path(place) / "whole", data, asked.steps, None)
    text = page(asked.steps, whole, streamed)
    print(text)
    if asked.write:
        asked.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
