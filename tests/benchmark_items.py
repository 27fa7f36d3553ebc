"""Items of a few benchmarks in files, small enough for a tiny model, in the columns that lm-eval reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from conftest import WORDS, write_jsonl

LABELS = ["A", "B", "C", "D"]


def arc_items(count: int, golds: list[int] | None = None) -> list[dict[str, Any]]:
    rng = random.Random(1)
    items = []
    for at in range(count):
        question = f"What is {' '.join(rng.sample(WORDS, 3))} {at}?"
        choices = rng.sample(WORDS, 4)
        gold = rng.randrange(4)  # drawn in any case: the items must not depend on the right answers
        gold = golds[at] if golds else gold
        items.append({"question": question, "choices": {"text": choices, "label": LABELS}, "answerKey": LABELS[gold]})
    return items


def hellaswag_items(count: int) -> list[dict[str, Any]]:
    rng = random.Random(2)
    return [
        {
            "activity_label": "Walking",
            "ctx_a": f"A {rng.choice(WORDS)} dog and a {rng.choice(WORDS)} cat number {at}.",
            "ctx_b": "then they",
            "endings": [f"go {' '.join(rng.sample(WORDS, length))}." for length in (1, 2, 3, 5)],
            "label": str(rng.randrange(4)),
        }
        for at in range(count)
    ]


def mmlu_items(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"question": f"Which {at}?", "choices": rng.sample(WORDS, 4), "answer": rng.randrange(4)} for at in range(count)
    ]


def write_items(root: Path, golds: list[int] | None = None, arc: int = 8) -> Path:
    """A directory as `--benchmark-data` takes it: ARC (easy), HellaSwag, and one subject of MMLU."""
    for place, rows in {
        "allenai/ai2_arc/ARC-Easy/test": arc_items(arc, golds),
        "Rowan/hellaswag/validation": hellaswag_items(4),
        "cais/mmlu/anatomy/test": mmlu_items(5, 3),
        "cais/mmlu/anatomy/dev": mmlu_items(3, 4),
    }.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(root / f"{place}.jsonl", rows)
    return root
