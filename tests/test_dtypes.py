"""The arithmetic is what the recipe asks for, also where the frozen weights are stored in another dtype."""

from __future__ import annotations

from pathlib import Path

import pytest

from test_pipeline import run_job


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_bf16_arithmetic_over_weights_stored_otherwise(
    stored: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    def losses(name: str, model_dtype: str, train_dtype: str) -> list[float]:
        model = {"path": str(tiny_model), "dtype": model_dtype}
        train = {"steps": 3, "dtype": train_dtype}
        run = run_job(tiny_model, rows_file, tmp_path / name, model=model, train=train, evaluate={"rows": 2})
        return [event["loss"] for event in run.events() if event["event"] == "step"]

    found, exact = losses("found", stored, "bf16"), losses("exact", "fp32", "fp32")
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)
