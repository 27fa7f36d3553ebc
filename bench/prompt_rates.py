"""Learning rates of prompts and prefixes on the demo model: loss on held-out answers after a few steps.

    python bench/prompt_rates.py [--method prompt prefix] [--rates …] [--steps 16] [--held 24]

Rows are functions and their docstrings; every run starts from the method's defaults and the same seed.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch

from docstring_rows import docstring_rows
from tunesmith.base import silent
from tunesmith.batch import Example, pack
from tunesmith.evaluation.answers import mean_nll
from tunesmith.methods import Prefix, Prompt
from tunesmith.models.load import load_model, load_tokenizer, locate_model
from tunesmith.objectives import Supervised
from tunesmith.recipe import TrainSpec
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer, learning_rate_at, set_learning_rate

METHODS: dict[str, tuple[Any, list[float]]] = {
    "prompt": (Prompt(), [1e-3, 3e-3, 1e-2]),
    "prefix": (Prefix(), [3e-4, 1e-3, 5e-3]),
}
BATCH = 4


def examples(count: int, tokenizer: Any) -> list[Example]:
    """Rows in the model's own chat template, answers as targets."""
    found = []
    for row in docstring_rows(count):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        prompt, answer = tokenizer.encode(asked), tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
        weights = torch.tensor([0.0] * len(prompt) + [1.0] * len(answer))
        found.append(Example(torch.tensor(prompt + answer), {"target_weights": weights}, {"target_weights": "token"}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--held", type=int, default=24)
    asked = parser.parse_args()
    location = locate_model("demo")
    rows = examples(asked.held + BATCH * asked.steps, load_tokenizer(location))
    held, rows = rows[: asked.held], rows[asked.held :]
    for name in asked.method:
        method, rates = METHODS[name]
        for rate in asked.rates or rates:
            model = load_model(location, dtype=torch.bfloat16, device=torch.device("cpu"))
            torch.manual_seed(0)
            method.adapt(model)
            start = mean_nll(model, held, packed=True, progress=silent)
            optimizer = build_optimizer(model, TrainSpec(), rate)
            plan: Any = SimpleNamespace(learning_rate=rate, steps=asked.steps, warmup_steps=1)
            model.train()
            for number in range(1, asked.steps + 1):
                set_learning_rate(optimizer, learning_rate_at(number, TrainSpec(), plan))
                step(model, Supervised(), optimizer, [pack(rows[BATCH * (number - 1) : BATCH * number])])
            after = mean_nll(model, held, packed=True, progress=silent)
            print(
                f"{name} at {rate:g}: {start:.3f} nats a token at its start, {after:.3f} after {asked.steps} steps",
                flush=True,
            )


if __name__ == "__main__":
    main()
