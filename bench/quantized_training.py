"""A training step over a base in 4 bits beside one over the base in bf16, in alternation in one process.

    python bench/quantized_training.py [--model demo] [--tokens 2048] [--turns 5] [--memory] [--out FILE.md]

`bitsandbytes' layers` is a base in NF4 whose layers run by themselves, as they did before the fused blocks read 4-bit
weights; `simulated` is `quantization_aware`. Peak memory is measured for each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.batch import Batch, Example, pack
from tunesmith.cli.display import quiet_libraries
from tunesmith.methods import Lora
from tunesmith.models import projection
from tunesmith.models.load import load_model, locate_model
from tunesmith.models.quantized import quantization
from tunesmith.objectives import Supervised

SIDES = ("LoRA, bf16", "QLoRA, NF4, bitsandbytes' layers", "QLoRA, NF4", "QLoRA, FP4", "LoRA, simulated q4_0")
ROW = 128
"""Tokens a row; the second half of each is trained on."""


def batch_of(tokens: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    weights = {"target_weights": (torch.arange(ROW) >= ROW // 2).float()}
    rows = [
        Example(torch.randint(3, vocabulary, (ROW,), generator=generator), weights, {"target_weights": "token"})
        for _ in range(tokens // ROW)
    ]
    return pack(rows)


def model_of(side: str, location: str) -> nn.Module:
    kind = "nf4" if "NF4" in side else "fp4" if "FP4" in side else "none"
    model = load_model(location, dtype=torch.bfloat16, device=torch.device("cpu"), quantized=quantization(kind))
    torch.manual_seed(0)
    Lora(quantization_aware="q4_0" if "simulated" in side else "none").adapt(model)
    return model.train()


def step_of(side: str, model: nn.Module, batch: Batch) -> Callable[[], float]:
    """A forward and backward pass, and what it gives."""
    packed = projection.packed_weight

    def step() -> float:
        model.zero_grad(set_to_none=True)
        projection.packed_weight = (lambda module: None) if "layers" in side else packed  # type: ignore[assignment]
        try:
            loss = Supervised().loss(model, batch)["nll"]
            loss.backward()
        finally:
            projection.packed_weight = packed  # type: ignore[assignment]
        return float(loss.detach()) / float(batch.tensors["target_weights"].sum())

    return step


def peak(side: str, location: str, tokens: int) -> None:
    """Prints the resident memory of a process that takes two steps, in MB, less what it had before it loaded."""
    vocabulary = 49152
    batch = batch_of(tokens, vocabulary)
    before = _status("VmRSS")
    step = step_of(side, model_of(side, location), batch)
    step(), step()
    print(json.dumps({"held": _status("RssAnon"), "peak": _status("VmHWM"), "before": before}))


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", action="store_true", help="measure the peak of each side too")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    location = locate_model(given.model)
    if given.peak:
        peak(given.peak, location, given.tokens)
        return
    peaks = {}
    for side in SIDES if given.memory else ():
        command = [sys.executable, __file__, "--model", location, "--tokens", str(given.tokens), "--peak", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[side] = json.loads(output.splitlines()[-1])
    text = table(given, alternated(location, given), peaks)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


def alternated(location: str, given: argparse.Namespace) -> dict[str, tuple[list[float], float]]:
    """Seconds of every turn of each side, and the loss a token."""
    models: dict[str, Any] = {side: model_of(side, location) for side in SIDES}
    batch = batch_of(given.tokens, models[SIDES[0]].config.vocab_size)
    steps = {side: step_of(side, model, batch) for side, model in models.items()}
    losses = {side: step() for side, step in steps.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(given.turns):
        for side, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - started)
    return {side: (seconds[side], losses[side]) for side in SIDES}


def table(given: argparse.Namespace, found: dict[str, tuple[list[float], float]], peaks: dict[str, Any]) -> str:
    usual = found[SIDES[0]][0]
    lines = [
        f"Rank 16 on all linear layers, {given.tokens} tokens, forward and backward pass, median of {given.turns} "
        f"turns in alternation, {torch.get_num_threads()} thread(s); ratios are medians of those within a turn.\n",
        "| base | seconds | to LoRA | loss a token | peak of the process, MB |",
        "|---|---|---|---|---|",
    ]
    for side, (seconds, loss) in found.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, usual, strict=True))
        most = f"{peaks[side]['peak']:.0f}" if side in peaks else "–"
        lines.append(f"| {side} | {statistics.median(seconds):.2f} | {ratio:.2f} | {loss:.4f} | {most} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
