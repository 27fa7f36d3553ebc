"""The speed benchmark's JSON has the keys that others read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def test_json_of_the_speed_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from train_report import Result, as_json, as_text  # pyright: ignore[reportMissingImports]
    from turns import Turn  # pyright: ignore[reportMissingImports]

    def side(name: str, seconds: list[float], peak: int) -> Any:
        step = {"loss": 2.0, "targets": 50, "tokens": 200}
        if name == "gemm":
            step = {"best": 1e6, "layer": "q_proj", "table": "| q_proj |"}
        facts = {"own_rendering": {"rows": 8, "same_ids": 8, "differences": {}}, "dtypes": ["torch.bfloat16"]}
        facts |= {"attention": "sdpa", "trainable": 10, "settings": {"packing": False}, "plan": {"micro_batch": 8}}
        return SimpleNamespace(turns=[Turn(s, [step], peak) for s in seconds], facts=facts)

    names = {"gemm": [1.0, 1.0, 1.0], "tunesmith": [9.0, 1.0, 2.0], "trl-default": [9.0, 8.0, 20.0]}
    sides = {name: side(name, seconds, 400 if name == "trl-default" else 100) for name, seconds in names.items()}
    sides["trl-best"] = side("trl-best", [9.0, 4.0, 10.0], 300)
    shape = {"linear_weights": 1000, "head_weights": 400, "trainable": 10, "tokens": 200, "targets": 50}
    result = Result("lora-bf16", "lora", 1, shape, sides, "padding-free", {})

    about = {"machine": {"processor": "one", "cores": 2}, "versions": {"torch": "2"}}
    found = json.loads(json.dumps(as_json([result], about)))

    assert found["ratio_trl_default"] == 9.0
    assert found["ratio_trl_default_spread"] == [8.0, 10.0]
    assert (found["ratio_trl_best"], found["memory_ratio"], found["loss_difference"]) == (4.5, 0.25, 0.0)
    # (4 (200 x 1000 + 50 x 400) + 6 x 200 x 10) = 892,000 operations in one second and in two
    assert found["gemm_fraction_spread"] == [0.446, 0.892]
    assert "9.00 (8.00 … 10.00)" in as_text(result)
