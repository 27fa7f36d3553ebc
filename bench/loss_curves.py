"""Loss curves of a long run: the fast path, the plain one, and TRL, from the same adapter over the same rows.

    python bench/loss_curves.py [--steps 200] [--rows 1] [--both] [--json]

LoRA of rank 16 on the demo model in bf16, at a constant rate. The plain path pads its rows and runs transformers' own
blocks and attention; TRL runs in its fastest setting, or in two with `--both`, so that its difference from itself shows
how far rounding alone leads two curves apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from train_report import OURS, head
from train_speed import FASTER, Bench, Effort, Group, environment
from turns import Side, say

PLAIN = "tunesmith, plain path"
TRL = {f"TRL {name}": FASTER[name] for name in ("padding-free", "without checkpointing")}
WINDOWS = 4
"""Parts of the run whose mean losses are shown."""


def curves(steps: int, rows: int, names: list[str]) -> dict[str, list[float]]:
    """The losses of every step, by side; one side runs after the other."""
    with tempfile.TemporaryDirectory() as temporary:
        effort = Effort(warmup=0, alternations=1, steps=steps, try_all=False)
        bench = Bench(Group("loss-curves", rows=rows), effort, Path(temporary), [])
        found: dict[str, list[float]] = {}
        for name in names:
            side = _side(bench, name)
            try:
                turn = side.take(steps)
            finally:
                side.end()
            say(f"{name}: {turn.seconds / steps:.2f} s a step")
            found[name] = [step["loss"] for step in turn.steps]
    return found


def _side(bench: Bench, name: str) -> Side:
    if name in TRL:
        return bench.trl(name, TRL[name])
    return bench.ours(name, [] if name == OURS else ["train.packing=false"])


def differences(found: dict[str, list[float]]) -> list[tuple[str, str, float, float]]:
    """For pairs of sides the mean and the largest absolute difference of a step's loss."""
    names = list(found)
    pairs = [(one, other) for at, one in enumerate(names) for other in names[at + 1 :]]
    apart = {pair: [abs(a - b) for a, b in zip(found[pair[0]], found[pair[1]], strict=True)] for pair in pairs}
    return [(*pair, statistics.fmean(values), max(values)) for pair, values in apart.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1, help="of an optimizer step")
    parser.add_argument("--both", action="store_true", help="two of TRL's settings")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    given = parser.parse_args()
    found = curves(given.steps, given.rows, [OURS, PLAIN, *(TRL if given.both else list(TRL)[:1])])
    about = environment()
    print(f"{head(about)}\n")
    edges = [given.steps * part // WINDOWS for part in range(WINDOWS + 1)]
    spans = list(pairwise(edges))
    print("| mean loss of steps | " + " | ".join(f"{first + 1}–{last}" for first, last in spans) + " |")
    print("|---" * (WINDOWS + 1) + "|")
    for name, losses in found.items():
        means = [statistics.fmean(losses[first:last]) for first, last in spans]
        print(f"| {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    print("\n| difference of a step's loss | mean | largest |\n|---|---|---|")
    for one, other, mean, largest in differences(found):
        print(f"| {one} and {other} | {mean:.4f} | {largest:.4f} |")
    if given.json:
        print(json.dumps({**about, "losses": found}))


if __name__ == "__main__":
    main()
