"""How well copies with one and with three blocks tell what a step of the whole model takes: both timed in turn.

    python bench/block_copies.py [--turns 3] [--only NAME,NAME] [--work DIRECTORY] [--write]

`bench/plan_accuracy.py` compares a plan with the job that follows it. On a machine whose speed changes from minute to
minute that difference is the plan's error and the machine's change together. Here copies are timed as `plan
--calibrate` times them, and right before and after that a copy with all blocks over the same micro-batches of the same
jobs: what is left is the error of the copies. `--write` puts the table into docs/results/block-copies.md. What it
takes to unpack 4-bit weights is timed apart from copies, and is left out. About seven minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median

from plan_accuracy import JOBS, make_inputs, recipe_of, short_name
from tunesmith.batch import pack
from tunesmith.pipeline.calibration import BLOCKS, LEARNING, Stopwatch, span, usual_groups
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.shortened import Shortened
from tunesmith.recipe_file import check_recipe

OUT = Path("docs/results/block-copies.md")


def compared(name: str, place: Path, turns: int) -> list[tuple[float, float]]:
    """Of each turn: seconds that copies tell, and seconds of the whole model."""
    planned = plan_job(check_recipe(recipe_of(name, place, steps=8), name))
    layout = "packed" if planned.plan.packing else "padded"
    groups, _ = usual_groups(planned, planned.plan)
    learned = [pack(rows, layout).to(planned.hardware.device) for rows in groups]
    layers = planned.config.get_text_config().num_hidden_layers
    few, more, whole = copies = [Shortened(planned, blocks, learned) for blocks in (*BLOCKS, layers)]
    for one in copies:
        one.model.train()
        one.learn()
        one.learn()  # memory is new to the process at first
    watch, found = Stopwatch(time.perf_counter, planned), list[tuple[float, float]]()
    for _ in range(turns):
        before = watch.once(whole.learn)
        told = span(*watch.in_turn([few.learn, more.learn], LEARNING)).of(layers)
        found.append((told, (before + watch.once(whole.learn)) / 2))
    return found


def page(found: dict[str, list[tuple[float, float]]], command: str) -> str:
    lines = [
        "# Copies of blocks beside the whole model",
        "",
        f"`{command}`: seconds of a forward and a backward pass over micro-batches of each job, told by copies with "
        f"{BLOCKS[0]} and {BLOCKS[1]} blocks and measured with all blocks, in turn; {os.cpu_count()} cores. Medians of "
        f"the turns; beside them how much longer the same pass took in the slowest turn than in the quickest.",
        "",
        "| job | whole model s | told by copies | off | slowest over quickest turn |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, turns in found.items():
        whole = [measured for _, measured in turns]
        off = median(told / measured for told, measured in turns) - 1
        told = median(told for told, _ in turns)
        lines.append(f"| {name} | {median(whole):.2f} | {told:.2f} | {off:+.1%} | {max(whole) / min(whole) - 1:+.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", help="names of jobs, with commas between them", default="")
    parser.add_argument("--work", type=Path, default=Path("runs/plan-accuracy"))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    place = asked.work.resolve()
    place.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_inputs(place)
    found = dict[str, list[tuple[float, float]]]()
    for name in JOBS:
        answers = "evaluate" in JOBS[name]  # those jobs differ in what they judge
        if not answers and (not asked.only or short_name(name) in asked.only.split(",")):
            found[name] = compared(name, place, asked.turns)
            print(name, [f"{told:.2f} {measured:.2f}" for told, measured in found[name]], flush=True)
    only = f" --only {asked.only}" if asked.only else ""
    text = page(found, f"python bench/block_copies.py --turns {asked.turns}{only}")
    print(text)
    if asked.write:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
