"""Whole jobs over quantized bases: the plan, the adapter, its merging, and bases that are saved quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model, colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.methods import Lora, QLora
from tunesmith.models.load import load_model, read_config
from tunesmith.models.quantized import quantization, stored_quantization
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import load
from tunesmith.pipeline.merging import merge_run
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.quantizing import quantize_model
from tunesmith.plan.memory import quantized_bytes
from tunesmith.recipe import ModelSpec, Recipe
from tunesmith.recipe_file import check_recipe

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    build_model(root / "model")
    write_jsonl(root / "rows.jsonl", colour_rows(24))
    return root


def recipe(place: Path, name: str = "run", **sections: Any) -> Recipe:
    values = {
        "data": {"train": str(place / "rows.jsonl"), "test": 0.2},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.05, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 4, "rows": 4, "forgetting": "off", "resamples": 20},
        "output": str(place / name),
        **sections,
    }
    model = values.get("model", {})
    values["model"] = {"path": str(place / "model"), **model}
    return check_recipe(values, "test")


def resolved(asked: Recipe) -> dict[str, Any]:
    return {item.name: item.value for item in plan_job(asked).plan.resolved}


def test_qlora_is_lora_over_4_bits_and_the_plan_says_so(place: Path) -> None:
    plain = recipe(place, method={"kind": "qlora", "rank": 2})
    assert isinstance(plain.method, QLora) and plain.model.quantize == "nf4"
    assert resolved(plain)["model.quantize"] == "nf4"
    assert recipe(place, method="qlora", model={"quantize": "none"}).model.quantize == "nf4"
    assert recipe(place, method="qlora", model={"quantize": "fp4"}).model.quantize == "fp4"
    made = Recipe(model=ModelSpec(path="m"), data=plain.data, method=QLora())
    assert made.model.quantize == "nf4"
    assert "model.quantize" not in resolved(recipe(place))


def test_memory_knows_how_weights_are_stored(place: Path) -> None:
    bits = {name: 8 * quantized_bytes(quantization(name) or pytest.fail()) for name in ("nf4", "fp4", "int8")}
    assert bits["nf4"] == bits["fp4"] == pytest.approx(4.127) and bits["int8"] == pytest.approx(8, abs=0.1)
    assert 8 * quantized_bytes(quantization("nf4", False) or pytest.fail()) == 4.5
    sizes = [
        (memory := plan_job(recipe(place, model=model)).plan.memory).weights + memory.constants
        for model in ({"quantize": "nf4"}, {"quantize": "fp4", "double_quantization": False}, {"quantize": "int8"}, {})
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_a_qlora_run_is_merged_into_the_base_in_full_precision_and_says_so(place: Path) -> None:
    run = finetune(recipe(place, "qlora", method={"kind": "qlora", "rank": 2}))
    assert run.report is not None
    merged = merge_run(str(run.path), place / "qlora-merged")
    assert merged.check.passed and merged.note is not None and "merged into the base in full precision" in merged.note
    said = json.loads((place / "qlora-merged" / "merge.json").read_text())
    assert said["trained_over"] == "nf4" and not said["merged_into_rounded"]
    loaded = load(str(run.path))
    assert getattr(loaded, "is_quantized", False)


def test_an_adapter_of_loftq_is_merged_into_the_rounded_base(place: Path) -> None:
    method = {"kind": "qlora", "rank": 2, "init": "loftq"}
    run = finetune(recipe(place, "loftq", method=method))
    assert run.result is not None
    merged = merge_run(str(run.result), place / "loftq-merged")  # the adapter alone knows
    assert merged.check.passed and merged.note is not None and "this adapter was started from" in merged.note
    assert stored_quantization(read_config(str(place / "loftq-merged"))) is None
    plain = load_model(str(place / "loftq-merged"), dtype=torch.float32, device=torch.device("cpu"))
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    assert getattr(load(str(run.result)), "is_quantized", False)


def test_a_base_saved_in_4_bits_is_trained_over(place: Path) -> None:
    saved = quantize_model(str(place / "model"), place / "small", "nf4")
    assert saved.bytes_after < saved.bytes_before
    asked = recipe(place, "over-small", model={"path": str(place / "small")})
    assert resolved(asked)["model.quantize"] == "nf4"
    small, quantized = (plan_job(given).plan.memory for given in (asked, recipe(place, model={"quantize": "nf4"})))
    assert (small.weights, small.constants, small.optimizer) == (
        quantized.weights,
        quantized.constants,
        quantized.optimizer,
    )
    assert small.peak_bytes <= quantized.peak_bytes  # the whole model's file is in memory beside what is made of it
    assert finetune(asked).report is not None
    with pytest.raises(InputError, match="stored as nf4 already"):
        plan_job(recipe(place, model={"path": str(place / "small"), "quantize": "int8"}))
    with pytest.raises(InputError, match="stored as nf4 already"):
        quantize_model(str(place / "small"), place / "smaller", "fp4")
    with pytest.raises(InputError, match="trained whole"):
        plan_job(recipe(place, model={"path": str(place / "small")}, method="full"))


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"train": {"optimizer": "paged-adamw-8bit"}}, "train.optimizer"),
        ({"model": {"double_quantization": False}}, "model.double_quantization"),
        ({"model": {"quantize": "nf4"}, "method": {"init": "pissa"}}, "method.init"),
        ({"method": {"init": "loftq"}}, "method.init"),
        ({"model": {"quantize": "nf4"}, "method": {"quantization_aware": True}}, "method.quantization_aware"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    place: Path, sections: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available() and where == "train.optimizer":
        pytest.skip("there is a GPU to page from")
    with pytest.raises(InputError) as refused:
        plan_job(recipe(place, **sections))
    assert where in str(refused.value.where)


def test_quantized_weights_are_not_spread_over_processes(place: Path) -> None:
    with pytest.raises(InputError, match="cannot be spread"):
        recipe(place, method="qlora", train={"shard": True})


def test_a_run_through_simulated_4_bits_says_how_it_is_judged(place: Path) -> None:
    method = {"kind": "lora", "rank": 2, "quantization_aware": "nf4"}
    run = finetune(recipe(place, "aware", method=method))
    assert any("as it will be in 4 bits (nf4)" in note for note in run.read("plan.json")["notes"])
    assert merge_run(str(run.path), place / "aware-merged").check.passed
    assert isinstance(check_recipe(run_values(run.path), "again").method, Lora)


def run_values(path: Path) -> dict[str, Any]:
    from tunesmith.pipeline.locating import run_recipe
    from tunesmith.run import Run

    return run_recipe(Run.open(path)).model_dump(mode="json", exclude_defaults=True)
