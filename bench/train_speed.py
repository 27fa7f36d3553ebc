"""Training speed and memory beside TRL's on the same rows, both in turn in one run.

    python bench/train_speed.py [--quick] [--json] [--groups lora-bf16,lora-fp32,full-bf16] [--general]

The demo model is trained on functions of the standard library and their docstrings: LoRA of rank 16 on all linear
layers, 8 rows an optimizer step, AdamW at a constant rate. Every side is a process that stays alive; one of them at a
time takes a few optimizer steps. Rows, their order, the token ids, the targets and the adapter before the
first update are the same. Tunesmith's side is its whole pipeline, which decides micro-batch and kernels by its plan;
TRL's is `SFTTrainer.train()`. Times are wall-clock between two answers: data, forward, backward, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from docstring_rows import docstring_rows, write_rows
from random_models import FAMILIES
from train_report import BEST, DEFAULT, GEMM, OURS, Result, as_json, as_text, head
from turns import Side, say

HERE = Path(__file__).parent
SIDES = str(HERE / "train_sides.py")
MAX_LENGTH = 512
FASTER = {
    "without checkpointing": {"gradient_checkpointing": False},
    "padding-free": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "packing": {"gradient_checkpointing": False, "packing": True},
}
"""TRL's settings that could be faster than its defaults, tried one by one; the best is the one that is compared."""
QUICK_BEST = "padding-free"


@dataclass(frozen=True)
class Group:
    """One comparison.

    Attributes:
        model: `demo`, or a family of random models.
        rows: of an optimizer step.
        best: whether TRL's best settings are looked for and compared besides its defaults.
    """

    name: str
    model: str = "demo"
    method: str = "lora"
    dtype: str = "bf16"
    rows: int = 8
    best: bool = False

    @property
    def learning_rate(self) -> float:
        return 2e-4 if self.method == "lora" else 2e-5


GROUPS = [Group("lora-bf16", best=True), Group("lora-fp32", dtype="fp32"), Group("full-bf16", method="full")]
GENERAL = [Group(f"general-{family}", model=family) for family in FAMILIES]


@dataclass(frozen=True)
class Effort:
    """How long is measured, in optimizer steps."""

    warmup: int
    alternations: int
    steps: int
    try_all: bool

    @property
    def total(self) -> int:
        return self.warmup + self.alternations * self.steps


class Bench:
    """One group's directory, what both sides get, and its workers."""

    def __init__(self, group: Group, effort: Effort, directory: Path, settings: Sequence[str]) -> None:
        self.group, self.effort, self.directory, self.settings = group, effort, directory, settings
        self.model = group.model
        if group.model in FAMILIES:
            self.model = str(directory / "model")
            _run([str(HERE / "random_models.py"), group.model, self.model])
        write_rows(directory / "rows.jsonl", docstring_rows(group.rows * (effort.total + 2)))
        self._write_recipe()
        say(f"{group.name}: rendering rows, and the adapter before the first update")
        _run([SIDES, "prepare", self._work("prepare")])
        self.shape = json.loads((directory / "shape.json").read_text())

    def _write_recipe(self) -> None:
        group = self.group
        train = {
            "steps": self.effort.total,
            "batch_size": group.rows,
            "learning_rate": group.learning_rate,
            "warmup": 0,
        }
        train |= {"schedule": "constant", "dtype": group.dtype, "checkpoint_every": "off", "best": "last"}
        method = {"kind": "lora", "rank": 16, "alpha": 32.0} if group.method == "lora" else {"kind": "full"}
        data = {"train": str(self.directory / "rows.jsonl"), "checks": False, "max_length": MAX_LENGTH}
        recipe = {"model": self.model, "data": {**data, "overlong": "drop"}, "method": method, "train": train}
        recipe |= {"evaluate": "off", "output": str(self.directory / "run")}
        (self.directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def _work(self, name: str, **more: Any) -> str:
        """The path of a worker's orders."""
        orders = {"directory": str(self.directory), "recipe": str(self.directory / "recipe.yaml"), "set": self.settings}
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps({**orders, **more}), encoding="utf-8")
        return str(path)

    def trl_settings(self, faster: dict[str, Any]) -> dict[str, Any]:
        """What TRL is told; everything else is its default.

        Full fine-tuning in bf16 keeps TRL's default of fp32 weights under autocast, which is what Tunesmith does too.
        """
        settings: dict[str, Any] = {
            "per_device_train_batch_size": self.group.rows,
            "max_steps": self.effort.total,
            "max_length": MAX_LENGTH,
            "learning_rate": self.group.learning_rate,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "completion_only_loss": True,
            "disable_tqdm": True,
        }
        if self.group.dtype == "fp32":
            settings["bf16"] = False
        elif self.group.method == "lora":
            settings["model_init_kwargs"] = {"dtype": "bfloat16"}
        if faster.get("packing"):
            settings["per_device_train_batch_size"] = max(1, round(self.shape["tokens"] / MAX_LENGTH))
        return settings | faster

    def ours(self, name: str = OURS, settings: Sequence[str] = ()) -> Side:
        say(f"{self.group.name}: starting {name}")
        stem = name.replace(" ", "-").replace(",", "")
        own = [*self.settings, *settings, f"output={self.directory / stem}"]
        return Side(name, [SIDES, "tunesmith", self._work(stem, set=own)], self.directory / f"{stem}.log")

    def trl(self, name: str, faster: dict[str, Any]) -> Side:
        say(f"{self.group.name}: starting {name}")
        lora = {"rank": 16, "alpha": 32} if self.group.method == "lora" else None
        more = {"model": self.shape["location"], "lora": lora, "settings": self.trl_settings(faster)}
        work = self._work(name.replace(" ", "-"), compare=name == DEFAULT, **more)
        return Side(name, [SIDES, "trl", work], self.directory / f"{name.replace(' ', '-')}.log")

    def gemm(self) -> Side:
        work = self._work(GEMM, layers=self.shape["layers"], dtype=self.group.dtype)
        return Side(GEMM, [SIDES, "gemm", work], self.directory / "gemm.log")

    def fastest_trl(self) -> tuple[str, dict[str, float]]:
        """The name of TRL's fastest settings, and the targets a second of each that was tried."""
        if not self.effort.try_all:
            return QUICK_BEST, {}
        tried: dict[str, float] = {}
        for name, faster in FASTER.items():
            side = self.trl(name, faster)
            side.take(1)
            turn = side.take(2)
            tried[name] = turn.total("targets") / turn.seconds
            say(f"{self.group.name}: TRL {name}: {tried[name]:.1f} targets/s")
            side.end()
        return max(tried, key=tried.__getitem__), tried


def run_group(group: Group, effort: Effort, settings: Sequence[str]) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(group, effort, Path(temporary), settings)
        best, tried = bench.fastest_trl() if group.best else (None, {})
        sides = [bench.gemm(), bench.ours(), bench.trl(DEFAULT, {})]
        if best is not None:
            sides.append(bench.trl(BEST, FASTER[best]))
        try:
            _alternate(group, effort, sides)
        finally:
            for side in sides:
                side.end()
    return Result(group.name, group.method, effort.warmup, bench.shape, {s.name: s for s in sides}, best, tried)


def _alternate(group: Group, effort: Effort, sides: list[Side]) -> None:
    for side in sides:
        turn = side.take(1 if side.name == GEMM else effort.warmup)
        say(f"{group.name}: warm-up of {side.name}: {turn.seconds:.1f} s")
    for alternation in range(effort.alternations):
        shift = alternation % len(sides)  # nobody always runs behind the same neighbour
        took = []
        for side in sides[shift:] + sides[:shift]:
            turn = side.take(1 if side.name == GEMM else effort.steps)
            took.append(f"{side.name} {turn.seconds / len(turn.steps):.2f}")
        say(f"{group.name}: alternation {alternation + 1} of {effort.alternations}, s a step: {', '.join(took)}")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed:\n{done.stderr[-3000:]}")


def environment() -> dict[str, Any]:
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"machine": {"processor": processor, "cores": os.cpu_count()}, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="LoRA in bf16 alone, two alternations of two steps")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    parser.add_argument("--groups", default=",".join(group.name for group in GROUPS))
    parser.add_argument("--general", action="store_true", help="random models of other families too")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a side in one alternation")
    parser.add_argument("--warmup", type=int, default=2, help="optimizer steps of each side that are not counted")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of Tunesmith's recipe"
    )
    given = parser.parse_args()
    effort = Effort(given.warmup, given.alternations, given.steps, try_all=True)
    names = given.groups.split(",") + [group.name for group in GENERAL if given.general]
    if given.quick:
        effort, names = Effort(warmup=1, alternations=2, steps=2, try_all=False), [GROUPS[0].name]
    known = {group.name: group for group in GROUPS + GENERAL}
    if unknown := set(names) - set(known):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    about, results = environment(), list[Result]()
    print(head(about), flush=True)
    for name in names:
        results.append(run_group(known[name], effort, given.set))
        print(as_text(results[-1]), flush=True)
    if given.json:
        print(json.dumps(as_json(results, about)))


if __name__ == "__main__":
    main()
