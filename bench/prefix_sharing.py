"""What it saves that all rows attend to one prefix: a training step against one with a copy before every row.

    python bench/prefix_sharing.py [--tokens 20 100] [--rows 8] [--length 96] [--rounds 7]

Both steps are done in turn, on the same random rows; the ratio is of the medians. Their losses are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch, Example, pack
from tunesmith.methods import Prefix
from tunesmith.methods.prefix import PrefixedEmbedding
from tunesmith.methods.prompt import prompted
from tunesmith.models.load import load_model, locate_model
from tunesmith.objectives import Supervised


class Copies:
    """A prefix whose tokens run through all layers in front of each row."""

    def __init__(self, embedding: PrefixedEmbedding) -> None:
        self._embedding = embedding

    def __enter__(self) -> None:
        cast(Any, self._embedding).ancestors = lambda: None

    def __exit__(self, *raised: object) -> None:
        del cast(Any, self._embedding).ancestors


def rows_of(count: int, length: int, before: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        own = torch.randint(3, 40000, (length,), generator=generator)
        trained = torch.cat([torch.zeros(len(before)), (torch.arange(length) >= length // 2).float()])
        token_ids = torch.cat([torch.tensor(before, dtype=torch.long), own])
        rows.append(Example(token_ids, {"target_weights": trained}, {"target_weights": "token"}))
    batch = pack(rows)
    # Tokens are moved behind the prefix once more when they meet the model.
    return replace(batch, positions=batch.positions - len(before))


def step(model: nn.Module, batch: Batch) -> tuple[float, Tensor]:
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    loss = Supervised().loss(model, batch)["nll"] / batch.tensors["target_weights"].sum()
    loss.backward()
    return time.perf_counter() - started, loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    for tokens in asked.tokens:
        model = load_model(locate_model(asked.model), dtype=torch.bfloat16, device=torch.device("cpu")).train()
        Prefix(tokens=tokens).adapt(model)
        embedding = cast(PrefixedEmbedding, prompted(model))
        plain = rows_of(asked.rows, asked.length, [])
        copied = rows_of(asked.rows, asked.length, embedding.prompt_ids)
        taken: dict[str, list[float]] = {"shared": [], "copies": []}
        losses: dict[str, float] = {}
        for _ in range(asked.rounds + 1):
            seconds, loss = step(model, plain)
            taken["shared"].append(seconds)
            losses["shared"] = float(loss)
            with Copies(embedding):
                seconds, loss = step(model, copied)
            taken["copies"].append(seconds)
            losses["copies"] = float(loss)
        shared, copies = (statistics.median(times[1:]) for times in taken.values())
        print(
            f"{tokens} tokens before {asked.rows} rows of {asked.length}: a step takes {shared:.2f} s with one prefix, "
            f"{copies:.2f} s with copies, {copies / shared:.2f} times as long; losses {losses['shared']:.4f} and "
            f"{losses['copies']:.4f}"
        )


if __name__ == "__main__":
    main()
