"""How speed and memory of training grow with the length of rows and with their number.

    python bench/scaling.py [--quick] [--alternations 5] [--only length|rows] [--json]

The demo model with LoRA in bf16, as `tunesmith train` would run it. First rows of 128 to 4096 tokens, the same number
of tokens in every optimizer step, micro-batches by the plan; then 1 to 16 rows of 200 tokens in one micro-batch. About
a third of the tokens are targets. Every length and number is a process of its own; they take steps in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train_report import head
from train_speed import SIDES, environment
from turns import Side, say

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
ROWS, ROW_LENGTH = (1, 2, 4, 8, 16), 200
TARGET_SHARE = 1 / 3
TEMPLATE_TOKENS = 40
"""More than the demo model's template puts around a prompt."""
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """Rows of an optimizer step.

    Attributes:
        micro_batch: rows of a forward pass; the plan decides when it is None.
    """

    length: int
    rows: int
    micro_batch: int | None = None


class Texts:
    """Rows that have just the wanted length once they are cut, made of the words of Python's language reference."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        from tunesmith.data.general_text import general_text
        from tunesmith.models.demo import demo_model

        self.words = " ".join(general_text()[1]).split()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())

    def row(self, length: int, draw: random.Random) -> dict[str, str]:
        prompt = self._of(max(8, round(length * (1 - TARGET_SHARE)) - TEMPLATE_TOKENS), draw)
        return {"prompt": prompt, "completion": self._of(round(length * 0.6) + TEMPLATE_TOKENS, draw)}

    def _of(self, tokens: int, draw: random.Random) -> str:
        ids = self.tokenizer.encode(" ".join(draw.choices(self.words, k=tokens)))
        return self.tokenizer.decode(ids[:tokens])


def start(load: Load, steps: int, texts: Texts, directory: Path) -> Side:
    """The worker of one load, ready for its first step."""
    directory.mkdir()
    draw = random.Random(load.length)
    rows = [texts.row(load.length, draw) for _ in range(load.rows * min(steps, 8))]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(directory / "rows.jsonl"), "checks": False, "max_length": load.length, "overlong": "truncate"}
    train: dict[str, Any] = {"steps": steps, "batch_size": load.rows, "checkpoint_every": "off", "dtype": "bf16"}
    if load.micro_batch is not None:
        train["micro_batch"] = load.micro_batch
    recipe = {"model": "demo", "data": data, "train": train, "evaluate": "off", "output": str(directory / "run")}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    work = directory / "work.json"
    work.write_text(json.dumps({"recipe": str(directory / "recipe.yaml"), "set": []}))
    name = f"{load.rows} x {load.length}"
    say(f"starting {name}")
    return Side(name, [SIDES, "tunesmith", str(work)], directory / "log")


def measure(loads: Sequence[Load], alternations: int, warmup: int) -> list[Side]:
    texts = Texts()
    with tempfile.TemporaryDirectory() as temporary:
        sides: list[Side] = []
        for load in loads:
            side = start(load, warmup + alternations, texts, Path(temporary) / f"{load.rows}x{load.length}")
            sides.append(side)
            say(f"{side.name}: warm-up {side.take(warmup).seconds:.1f} s")
        for alternation in range(alternations):
            took = [f"{side.name}: {side.take(1).seconds:.2f}" for side in sides]
            say(f"alternation {alternation + 1} of {alternations}, s a step: {', '.join(took)}")
        for side in sides:
            side.end()
    return sides


def speeds(side: Side) -> list[float]:
    """Tokens a second in each alternation."""
    return [turn.total("tokens") / turn.seconds for turn in side.turns[1:]]


def table(first: str, loads: Sequence[Load], sides: Sequence[Side]) -> str:
    lines = [
        f"| {first} | micro-batch | tokens a step | tokens/s | smallest … largest | peak memory |",
        "|---" * 6 + "|",
    ]
    for load, side in zip(loads, sides, strict=True):
        found, plan = speeds(side), side.facts["plan"]
        tokens, peak = side.turns[-1].total("tokens"), side.turns[-1].peak_bytes
        name = load.rows if load.micro_batch else load.length
        lines.append(
            f"| {name} | {plan['micro_batch']} | {tokens:.0f} | {statistics.median(found):.0f} | "
            f"{min(found):.0f} … {max(found):.0f} | {peak / GIB:.2f} GiB |"
        )
    return "\n".join(lines)


def rows_json(loads: Sequence[Load], sides: Sequence[Side]) -> list[dict[str, Any]]:
    return [
        {**vars(load), "tokens_per_second": speeds(side), "peak_bytes": side.turns[-1].peak_bytes}
        for load, side in zip(loads, sides, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2048 tokens a step, up to 1024 a row, two alternations")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    parser.add_argument("--alternations", type=int, default=None)
    parser.add_argument("--only", choices=("length", "rows"))
    given = parser.parse_args()
    tokens, longest, alternations = (2048, 1024, 2) if given.quick else (4096, 4096, 5)
    alternations = given.alternations or alternations
    by_length = [Load(length, tokens // length) for length in LENGTHS if length <= longest]
    by_rows = [Load(ROW_LENGTH, rows, rows) for rows in ROWS]
    about = environment()
    found: dict[str, Any] = dict(about)
    print(f"{head(about)}\n")
    if given.only != "rows":
        sides = measure(by_length, alternations, warmup=2)
        print(table("tokens a row", by_length, sides), "\n")
        of_length = {load.length: speeds(side) for load, side in zip(by_length, sides, strict=True)}
        ratios = [a / b for a, b in zip(of_length[by_length[-1].length], of_length[512], strict=True)]
        ratio, spread = statistics.median(ratios), [min(ratios), max(ratios)]
        print(f"{by_length[-1].length} tokens over 512: {ratio:.2f} ({spread[0]:.2f} … {spread[1]:.2f})\n")
        found |= {"by_length": rows_json(by_length, sides), "ratio": ratio, "ratio_spread": spread}
    if given.only != "length":
        sides = measure(by_rows, alternations, warmup=2)
        print(table(f"rows of {ROW_LENGTH} tokens", by_rows, sides), "\n")
        found["by_rows"] = rows_json(by_rows, sides)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
