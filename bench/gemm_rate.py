"""The rate of this machine's matrix products at the shapes of a model's layers.

    python bench/gemm_rate.py [--model demo] [--tokens 1536] [--targets 420] [--dtype bf16] [--json]

For each linear layer with weight [N, K]: the forward product [M, K] x [K, N], the gradient by its input, [M, N] x [N,
K], and the gradient by its weight, [N, M] x [M, K]. M is the number of tokens of an optimizer step; for the head, of
targets.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """The product of a linear layer: ``rows`` tokens of ``inputs`` features become ``outputs`` features."""

    name: str
    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second of the three products of a layer."""

    layer: Layer
    forward: float
    by_input: float
    by_weight: float

    @property
    def best(self) -> float:
        return max(self.forward, self.by_input, self.by_weight)


def layers_of(path: str, tokens: int, targets: int) -> list[Layer]:
    """The different shapes among a model's linear layers, the output head among them, each under its first name."""
    from transformers.pytorch_utils import Conv1D

    from tunesmith.models.load import locate_model, read_config
    from tunesmith.models.measure import meta_model

    location = locate_model(path)
    model: Any = meta_model(read_config(location), location)
    head = model.get_output_embeddings()
    found: dict[tuple[int, int, int], Layer] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
        else:
            continue
        rows = targets if module is head else tokens
        layer = Layer(name.rsplit(".", 1)[-1], rows, int(inputs), int(outputs))
        found.setdefault((layer.rows, layer.inputs, layer.outputs), layer)
    return list(found.values())


def measure(layer: Layer, dtype: torch.dtype, seconds: float) -> Rates:
    """Rates of one layer's products, each repeated for about ``seconds``."""
    inputs = torch.randn(layer.rows, layer.inputs).to(dtype)
    weight = torch.randn(layer.outputs, layer.inputs).to(dtype)
    gradient = torch.randn(layer.rows, layer.outputs).to(dtype)
    operations = 2 * layer.rows * layer.inputs * layer.outputs
    return Rates(
        layer,
        operations / _seconds(lambda: F.linear(inputs, weight), seconds),
        operations / _seconds(lambda: torch.mm(gradient, weight), seconds),
        operations / _seconds(lambda: torch.mm(gradient.t(), inputs), seconds),
    )


def _seconds(product: Any, budget: float) -> float:
    """The median time of one product."""
    found: list[float] = []
    for _ in range(2):
        product()
    until = time.perf_counter() + budget
    while time.perf_counter() < until or len(found) < 3:
        started = time.perf_counter()
        result: Tensor = product()
        found.append(time.perf_counter() - started)
        del result
    return sorted(found)[len(found) // 2]


def table(rates: list[Rates]) -> str:
    lines = ["| layer | M | K | N | forward | by input | by weight |", "|---|---|---|---|---|---|---|"]
    for rate in rates:
        layer = rate.layer
        numbers = " | ".join(f"{value / 1e12:.2f}" for value in (rate.forward, rate.by_input, rate.by_weight))
        lines.append(f"| {layer.name} | {layer.rows} | {layer.inputs} | {layer.outputs} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--targets", type=int, default=420)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each product")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    layers = layers_of(given.model, given.tokens, given.targets)
    rates = [measure(layer, DTYPES[given.dtype], given.seconds) for layer in layers]
    best = max(rates, key=lambda rate: rate.best)
    print(f"TFLOP/s in {given.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n{table(rates)}\n")
    print(f"best: {best.best / 1e12:.2f} TFLOP/s ({best.layer.name})")
    if given.json:
        products = [{**vars(r.layer), "forward": r.forward, "input": r.by_input, "weight": r.by_weight} for r in rates]
        print(json.dumps({"best": best.best, "dtype": given.dtype, "products": products}))


if __name__ == "__main__":
    main()
