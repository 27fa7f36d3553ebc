"""Where the time of a training step goes: torch's operations, by kind.

    python bench/step_profile.py [--rows 16] [--json]

One optimizer step of LoRA (rank 16, all linear layers) on the demo model in bf16, packed rows of functions and their
docstrings, after two steps that are not looked at. The profiler makes small operations look slower than they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from typing import Any

from docstring_rows import docstring_rows
from train_report import head
from train_speed import environment

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_", "aten::addmv"),
    "batched products of attention": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    "softmax and its gradient": ("aten::_softmax", "aten::_softmax_backward_data"),
    "gates": ("aten::silu", "aten::silu_backward"),
    "element-wise": ("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::addcmul", "aten::div", "aten::div_"),
    "norms": ("aten::native_layer_norm_backward", "aten::_fused_rms_norm", "aten::linalg_vector_norm", "aten::pow"),
    "copies, casts and gathering": ("aten::copy_", "aten::cat", "aten::index_select", "aten::roll", "aten::fill_"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, names in KINDS.items() if name in names), "the rest, Python among it")


def measured(rows: int) -> tuple[int, float, Counter[str]]:
    """Tokens, seconds of a step without the profiler, and seconds by kind with it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from tunesmith.batch import Example, pack
    from tunesmith.methods import Lora
    from tunesmith.models.demo import demo_model
    from tunesmith.models.load import load_model, load_tokenizer
    from tunesmith.objectives import Supervised
    from tunesmith.recipe import TrainSpec
    from tunesmith.train.loop import step
    from tunesmith.train.optim import build_optimizer

    location = str(demo_model())
    model = load_model(location, dtype=torch.bfloat16, device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(location)
    torch.manual_seed(0)
    Lora(rank=16).adapt(model)
    model.train()
    optimizer = build_optimizer(model, TrainSpec(), 2e-4)
    examples = []
    for row in docstring_rows(rows):
        asked, answer = (tokenizer.encode(row[name]) for name in ("prompt", "completion"))
        weights = torch.tensor([0.0] * len(asked) + [1.0] * len(answer))
        examples.append(Example(torch.tensor(asked + answer), {"target_weights": weights}))
    batch = pack(sorted(examples, key=len))

    def one() -> float:
        started = time.perf_counter()
        step(model, Supervised(), optimizer, [batch])
        return time.perf_counter() - started

    one(), one()
    seconds = min(one() for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one()
    shares: Counter[str] = Counter()
    for event in profiled.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return batch.tokens, seconds, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    given = parser.parse_args()
    tokens, seconds, shares = measured(given.rows)
    about, total = environment(), sum(shares.values())
    print(f"{head(about)}\n\nA step of {tokens} tokens: {seconds:.2f} s, {total:.2f} s under the profiler.\n")
    print("| part | share |\n|---|---|")
    for kind, spent in shares.most_common():
        print(f"| {kind} | {spent / total:.0%} |")
    if given.json:
        print(json.dumps({**about, "tokens": tokens, "seconds": seconds, "shares": dict(shares)}))


if __name__ == "__main__":
    main()
