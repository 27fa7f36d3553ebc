"""Is an adapter that was trained through simulated 4 bits better after 4 bits? Plain LoRA beside it.

    python bench/quantization_aware.py [DATA] [--grid q4_0] [--steps 12] [--seeds 2] [--out FILE.md]

DATA is a directory with `corpus_peps` and `sql_wikisql_mlx`; without it the text and the rows come with Python. The
demo model's published weights lie on a 4-bit grid, on which such a comparison would mean little: it is first tuned as a
whole on the text until it is off that grid. Then each adapter is trained on the rows with the same seed, steps and
learning rate, merged in bf16, rounded to the grid, and scored on held-out rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from docstring_rows import docstring_rows, write_rows
from tunesmith.cli.display import quiet_libraries
from tunesmith.data.general_text import general_text
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.answers import row_nlls
from tunesmith.methods.adapted import merge_layers
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.low_rank import lora_layers
from tunesmith.metrics import paired_bootstrap
from tunesmith.metrics.statistics import RowStatistics
from tunesmith.models.load import load_model, locate_model
from tunesmith.models.quantization_grid import Grid
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import load_speaker, prepared_rows
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

CPU = torch.device("cpu")
GGUF = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}
PUBLISHED = Grid("q4_1")
"""The grid that the demo model was published on."""
HELD_OUT = 100
Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Where rows come from, as a recipe's `data` has them."""

    text: dict[str, Any]
    rows: dict[str, Any]
    held_out: str


def data_from(given: Path | None, directory: Path) -> Data:
    if given is not None:
        sql = given / "sql_wikisql_mlx"
        held_out = directory / "held-out.jsonl"
        held_out.write_text((sql / "test.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
        rows = {"train": str(sql / "train.jsonl"), "answer_after": "\nA: "}
        return Data({"train": str(given / "corpus_peps" / "train.jsonl")}, rows, str(held_out))
    text, rows, held_out = (directory / f"{name}.jsonl" for name in ("text", "rows", "held-out"))
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in general_text()[1]), encoding="utf-8")
    drawn = docstring_rows(1000 + HELD_OUT)
    write_rows(rows, drawn[:1000])
    write_rows(held_out, drawn[1000:])
    return Data({"train": str(text)}, {"train": str(rows)}, str(held_out))


def trained(model: str, data: dict[str, Any], method: dict[str, Any], train: dict[str, Any], output: Path) -> Run:
    started = time.perf_counter()
    values = {
        "model": model,
        "data": {**data, "checks": False},
        "method": method,
        "train": {"checkpoint_every": "off", **train},
        "evaluate": "off",
        "output": str(output),
        "seed": train_seed(output),
    }
    run = finetune(check_recipe(values, "bench"))
    losses = [event["loss"] for event in run.events() if event["event"] == "step"]
    print(f"{output.name}: {time.perf_counter() - started:.0f} s, loss {losses[0]:.3f} → {losses[-1]:.3f}", flush=True)
    return run


def train_seed(output: Path) -> int:
    return int(output.name.rpartition("-")[2]) if output.name[-1].isdigit() else 0


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that get an adapter: all linear ones but the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def distance(model: nn.Module, grid: Grid) -> float:
    return float(np.mean([grid.distance(module.weight) for module in linears(model).values()]))


def by_gguf(name: str) -> Rounding:
    """The rounding of gguf's own quantizer."""

    def rounded(weight: Tensor) -> Tensor:
        stored = gguf.quantize(weight.float().numpy(), GGUF[name])
        return torch.from_numpy(gguf.dequantize(stored, GGUF[name]))

    return rounded


def nlls(location: str, adapter: Path | None, rounding: Rounding | None, examples: Sequence[Any]) -> np.ndarray:
    """Of each row's targets, for a model whose adapter is merged and whose linear layers are rounded."""
    model: Any = load_model(location, dtype=torch.bfloat16, device=CPU)
    if adapter is not None:
        load_adapter(model, adapter)
        assert len(lora_layers(model)) == merge_layers(model)
    if rounding is not None:
        with torch.no_grad():
            for module in linears(model).values():
                module.weight.copy_(rounding(module.weight.detach()))
    return np.array(row_nlls(model, examples, packed=True, progress=lambda *_: None))


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods ``[rows]`` of each model by its name, and the targets of each row."""

    targets: np.ndarray
    found: dict[str, np.ndarray]

    def rows(self, name: str) -> RowStatistics:
        return RowStatistics(
            np.stack([self.targets, self.found[name]], axis=-1), lambda sums: sums[..., 1] / sums[..., 0]
        )

    def line(self, name: str) -> str:
        value = self.rows(name).corpus()
        return f"| {name} | {value:.4f} | {np.exp(value):.3f} |"

    def difference(self, before: str, after: str) -> str:
        found = paired_bootstrap(self.rows(before), self.rows(after), resamples=2000, confidence=0.95, seed=0)
        assert found.low is not None and found.high is not None
        return f"| {after} | {before} | {found.difference:+.4f} | {found.low:+.4f} … {found.high:+.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--grid", choices=["q4_0", "q4_1"], default="q4_0")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--off-grid-steps", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a directory for the runs; those that are there are used again")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        text = compare(given, given.work or Path(temporary))
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def compare(given: argparse.Namespace, work: Path) -> str:
    data, grid = data_from(given.data, work), Grid(given.grid)
    published, off = locate_model("demo"), work / "off-grid-0"
    if not (off / "report.json").is_file():
        text = {**data.text, "max_length": 512, "overlong": "truncate"}
        whole = {"steps": given.off_grid_steps, "batch_size": 2, "learning_rate": 3e-4}
        trained(published, text, {"kind": "full"}, whole, off)
    base = str(off / "model")
    apart = {at: load_model(at, dtype=torch.bfloat16, device=CPU) for at in (published, base)}
    lines = [
        HEAD.format(**{**vars(given), "data": "DATA" if given.data else ""}),
        "| weights | off its published Q4_1 grid | ",
    ]
    lines[1] += f"off the {grid.name} grid |\n|---|---|---|"
    lines += [
        f"| {name} | {distance(apart[at], PUBLISHED):.4f} | {distance(apart[at], grid):.4f} |"
        for name, at in (("published", published), ("tuned on the text", base))
    ]
    return "\n".join([*lines, "", *scored(given, work, data, base)]) + "\n"


def scored(given: argparse.Namespace, work: Path, data: Data, base: str) -> list[str]:
    """The table of scores, and that of differences."""
    grid, exact = Grid(given.grid), by_gguf(given.grid)
    spec = DataSpec(train=data.held_out, answer_after=data.rows.get("answer_after"), duplicates="keep", checks=False)
    rows = prepared_rows(load_speaker(base), spec).train[:HELD_OUT]
    examples = [row.example for row in rows]
    found = {"base": nlls(base, None, None, examples), "base, 4 bits": nlls(base, None, grid.rounded, examples)}
    names = {"lora": "LoRA", "aware": "aware LoRA"}
    differences = []
    same = True
    for seed in range(given.seeds):
        for kind, name in names.items():
            method = {
                "kind": "lora",
                "rank": given.rank,
                "quantization_aware": given.grid if kind == "aware" else "none",
            }
            output = work / f"{kind}-{seed}"
            if not (output / "report.json").is_file():
                train = {"steps": given.steps, "learning_rate": given.rate, "batch_size": 8, "micro_batch": 8}
                trained(base, data.rows, method, train, output)
            label = f"{name}, seed {seed}"
            found[label] = nlls(base, output / "adapter", None, examples)
            found[f"{label}, 4 bits"] = nlls(base, output / "adapter", grid.rounded, examples)
            if kind == "lora" or seed:
                continue
            same &= bool(np.array_equal(found[f"{label}, 4 bits"], nlls(base, output / "adapter", exact, examples)))
        plain, aware = (f"{name}, seed {seed}" for name in names.values())
        differences += [
            (plain, f"{plain}, 4 bits"),
            (plain, f"{aware}, 4 bits"),
            (f"{plain}, 4 bits", f"{aware}, 4 bits"),
        ]
    scores = Scores(np.array([row.example.targets for row in rows], dtype=np.float64), found)
    plain, aware = (f"{name}, all seeds, 4 bits" for name in names.values())
    for label, name in ((plain, "LoRA"), (aware, "aware LoRA")):
        found[label] = np.mean([found[f"{name}, seed {seed}, 4 bits"] for seed in range(given.seeds)], axis=0)
    return [
        f"{len(rows)} held-out rows, {int(scores.targets.sum())} target tokens:\n",
        "| model | nll a token, nats | perplexity |\n|---|---|---|",
        *(scores.line(name) for name in found),
        "\n| model | less | difference, nats | 95 % interval |\n|---|---|---|---|",
        *(scores.difference(*pair) for pair in (*differences, (plain, aware))),
        f"\nThe same scores through gguf's own quantizer: {'yes, to the last bit' if same else 'no'}.",
    ]


HEAD = """# LoRA through simulated 4 bits

Written by `python bench/quantization_aware.py {data} --grid {grid} --steps {steps} --rate {rate} --seeds {seeds}`.

The demo model, tuned as a whole for {off_grid_steps} steps on plain text so that its weights leave the 4-bit grid they
were published on; then rank {rank} on all linear layers for {steps} steps of 8 rows, plain and with
`quantization_aware: {grid}`, with the same rows, seed and learning rate. Adapters are merged in bf16 and every linear
layer but the head is rounded to {grid}. Off a grid: the length of what rounding changes over that of the weights.
"""


if __name__ == "__main__":
    main()
