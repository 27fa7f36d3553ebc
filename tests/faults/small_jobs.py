"""Small jobs for faults to befall: a tiny model, a few rows, and recipes that together use everything a run can do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from jobs import OUTPUT, RECIPE

from conftest import build_model, colour_rows, write_jsonl

BASE: dict[str, Any] = {
    "data": {"train": "../rows/train.jsonl", "validation": "../rows/validation.jsonl", "test": "../rows/test.jsonl"},
    "method": {"kind": "lora", "rank": 4},
    "train": {
        "steps": 4,
        "batch_size": 4,
        "micro_batch": 4,
        "learning_rate": 0.02,
        "dtype": "fp32",
        "packing": False,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "keep": 1,
    },
    "evaluate": {"rows": 4, "max_new_tokens": 3, "resamples": 20, "forgetting": "off", "samples": 1, "batch_size": 4},
    "output": OUTPUT,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, dropout, accumulation": {"method": {"dropout": 0.2}, "train": {"batch_size": 6, "micro_batch": 2}},
    "full": {"method": {"kind": "full"}, "train": {"learning_rate": 1e-3, "micro_batch": 2}},
    "packed": {"train": {"packing": True, "batch_size": 6, "micro_batch": 3}, "method": {"dropout": 0.1}},
    "mixture": {
        "data": {
            "train": [
                {"path": "../rows/train.jsonl", "weight": 2},
                {"path": "../rows/other.jsonl", "weight": 1},
            ],
            "replay": {"path": "../rows/replay.jsonl", "share": 0.2},
        },
        "train": {"steps": 6, "micro_batch": 2},
    },
    "early stopping": {
        "train": {
            "steps": 8,
            "evaluate_every": 1,
            "checkpoint_every": 3,
            "early_stopping": {"patience": 2, "min_delta": 100.0},
        }
    },
    "generation": {"train": {"generate_every": 1, "steps": 3}, "evaluate": {"forgetting": "../rows/general.txt"}},
}


def make_place(root: Path) -> Path:
    """Builds model and rows that all jobs below ``root`` share."""
    build_model(root / "base", tie_word_embeddings=True)
    rows = root / "rows"
    rows.mkdir()
    write_jsonl(rows / "train.jsonl", colour_rows(30))
    write_jsonl(rows / "other.jsonl", colour_rows(14, start=100))
    write_jsonl(rows / "replay.jsonl", colour_rows(10, start=150))
    write_jsonl(rows / "validation.jsonl", colour_rows(5, start=200))
    write_jsonl(rows / "test.jsonl", colour_rows(5, start=300))
    (rows / "general.txt").write_text("\n\n".join(row["prompt"] * 6 for row in colour_rows(6, start=400)))
    return root


def make_job(root: Path, name: str, **sections: Any) -> Path:
    """A directory of its own for a job, with its recipe: `BASE` with ``sections`` over it."""
    directory = root / name
    directory.mkdir(parents=True)
    recipe = _merged({"model": "../base", **copy.deepcopy(BASE)}, sections)
    if recipe["method"]["kind"] == "full":
        recipe["method"] = {"kind": "full"}
    (directory / RECIPE).write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return directory


def _merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merged(values[key], value)
        else:
            values[key] = value
    return values
