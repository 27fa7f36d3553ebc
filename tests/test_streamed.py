"""Block by block in a small memory: the same numbers as with the model in memory, and what cannot be done is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from conftest import build_model, colour_rows, write_jsonl
from tiny import VOCABULARY, random_rows, shake, tiny
from tunesmith.base import InputError, Interrupted
from tunesmith.batch import Batch, pack
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.models.embeddings import untrained_tokens
from tunesmith.models.forward import next_token_logits, next_token_logps
from tunesmith.models.streamed import StreamedModel, load_streamed, parts_in_memory
from tunesmith.models.weight_files import WeightFiles
from tunesmith.objectives import Supervised
from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run
from tunesmith.train.loop import step
from tunesmith.train.small_adamw import SmallAdamW

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}
TASK = {
    "method": {"kind": "lora", "rank": 2},
    "train": {"steps": 4, "batch_size": 8, "learning_rate": 0.01, "dtype": "fp32", "evaluate_every": 2},
    "evaluate": {"metrics": ["perplexity"], "rows": 8, "resamples": 20, "forgetting": "off"},
}


def both(
    directory: Path, family: str = "llama", method: Lora | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, StreamedModel]:
    """A model in memory and the same one in files, adapted alike."""
    model = tiny(family.partition("-")[0], dtype=dtype, **FAMILIES[family])
    model.save_pretrained(directory)
    streamed = load_streamed(directory, model.config, dtype=dtype, tokens_at_once=64)
    for one in (model, streamed):
        torch.manual_seed(3)
        (method or Lora(rank=4)).adapt(one)
        shake(one)
    return model, streamed


def batch() -> Batch:
    return pack(random_rows([9, 4, 14, 6], weights=(0.5, 1.0)))


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.train()
    sum(Supervised().loss(model, batch()).values(), torch.zeros(())).backward()
    return {name: cast(Tensor, weight.grad) for name, weight in trainable_parameters(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_a_model_in_memory(family: str, tmp_path: Path) -> None:
    model, streamed = both(tmp_path, family)
    positions, targets = torch.arange(20), torch.arange(20) + 7
    logps = [next_token_logps(one, batch(), positions, targets) for one in (model, streamed)]
    logits = [next_token_logits(one, batch(), positions) for one in (model, streamed)]
    for one, other in (logps, logits):
        assert torch.allclose(one, other, atol=1e-4)
    expected, found = gradients(model), gradients(streamed)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def test_dropout_draws_the_same_numbers_twice(tmp_path: Path) -> None:
    expected, found = (gradients(one) for one in both(tmp_path, method=Lora(rank=4, dropout=0.3)))
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def test_weights_are_in_memory_only_while_they_are_used(tmp_path: Path) -> None:
    _, streamed = both(tmp_path)
    gradients(streamed)
    holding = [
        number
        for number, block in enumerate(streamed.model.layers)
        if not cast(Any, block).mlp.down_proj.weight.isnan().all()
    ]
    assert holding == [0]  # the backward pass ends with it
    with parts_in_memory(streamed) as parts:
        assert [bool(cast(Any, part).mlp.up_proj.weight.isfinite().all()) for part in parts] == [True, True]
    assert all(cast(Any, block).mlp.up_proj.weight.isnan().all() for block in streamed.model.layers)


def test_frozen_weights_of_another_dtype_are_cast_as_they_are_read(tmp_path: Path) -> None:
    model, _ = both(tmp_path)
    streamed = load_streamed(tmp_path, model.config, dtype=torch.bfloat16, tokens_at_once=64)
    with parts_in_memory(streamed) as parts:
        for part, block in zip(parts, model.model.layers, strict=True):
            expected = block.mlp.down_proj.weight.bfloat16()
            assert torch.equal(cast(Any, part).mlp.down_proj.weight, expected)


def test_losses_in_bf16_are_near(tmp_path: Path) -> None:
    model, streamed = both(tmp_path, dtype=torch.bfloat16)
    losses = [float(step(one, Supervised(), SmallAdamW([], 0.1), [batch()]).loss) for one in (model, streamed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_untrained_tokens_are_found_without_the_whole_table(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:8] = model.get_input_embeddings().weight[5].clone()
        model.get_input_embeddings().weight[9] = 1e-6
    model.save_pretrained(tmp_path)
    streamed = load_streamed(tmp_path, model.config, dtype=torch.float32, tokens_at_once=64)
    asked = [4, 5, 6, 9, VOCABULARY + 1]
    assert untrained_tokens(cast(Any, streamed), asked) == untrained_tokens(model, asked) == [5, 6, 9]


def test_small_adamw_makes_the_bytes_of_torchs(tmp_path: Path) -> None:
    weights = [[torch.nn.Parameter(torch.arange(12.0).view(3, 4) / 7), torch.nn.Parameter(torch.ones(5))] for _ in "ab"]
    optimizers: list[Any] = [
        SmallAdamW([{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}], 0.01)
        if number
        else torch.optim.AdamW(
            [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}], 0.01, fused=True
        )
        for number, (matrix, vector) in enumerate(weights)
    ]
    for round_ in range(4):
        for (matrix, vector), optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            (matrix.sin().sum() + (vector**2).sum() * (round_ + 1)).backward()
            optimizer.step()
        if round_ == 1:
            optimizers[1].load_state_dict(optimizers[1].state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    theirs, ours = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert theirs.keys() == ours.keys() and theirs[0].keys() == ours[0].keys()


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="no safetensors file"):
        WeightFiles(tmp_path)
    with pytest.raises(InputError, match="no safetensors weights"):
        WeightFiles(tmp_path / "nowhere")


def test_other_weights_than_the_configuration_says_are_told(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    model.config.intermediate_size = 64
    with pytest.raises(InputError, match="6 of another shape"):
        load_streamed(tmp_path, model.config, dtype=torch.float32, tokens_at_once=64)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("streamed") / "model", tie_word_embeddings=True, num_hidden_layers=3)


def recipe(model: Path, directory: Path, budget: Any = "512MB", **sections: Any) -> Any:
    rows = write_jsonl(directory / "rows.jsonl", colour_rows(60))
    values: dict[str, Any] = json.loads(json.dumps(TASK))
    for name, section in sections.items():
        own = values.get(name, {})
        values[name] = {**own, **section} if isinstance(own, dict) and "kind" not in section else section
    data = {"train": str(rows), "validation": 0.1, "test": 0.2}
    output = str(directory / sections.pop("output", "run"))
    given = {} if budget is None else {"budget": {"memory": budget}}
    return check_recipe({**values, "model": {"path": str(model)}, "data": data, **given, "output": output}, "test")


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] in ("step", "validation")]


def test_a_job_under_a_budget_goes_where_the_ordinary_one_goes(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    ordinary = finetune(recipe(model_directory, tmp_path / "a", None))
    streamed = finetune(recipe(model_directory, tmp_path / "b"))
    assert streamed.read("plan.json")["streamed_tokens"] and ordinary.read("plan.json")["streamed_tokens"] is None
    assert losses(streamed) == pytest.approx(losses(ordinary), rel=1e-4)
    names = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    from safetensors.torch import load_file

    theirs, ours = (load_file(run.path / names[0]) for run in (ordinary, streamed))
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in theirs)
    assert (ordinary.path / names[1]).read_text() == (streamed.path / names[1]).read_text()
    reports: list[Any] = [ordinary.report, streamed.report]
    one, other = ({entry["name"]: entry["tuned"] for entry in report["metrics"]} for report in reports)
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)


def test_a_stopped_job_resumes_to_the_same_bytes(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "parted").mkdir()
    whole = finetune(recipe(model_directory, tmp_path / "whole", train={"checkpoint_every": 1}))
    asked = recipe(model_directory, tmp_path / "parted", train={"checkpoint_every": 1})

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        finetune(asked, watcher=Watcher(event=stop))
    parted = finetune(asked, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (parted.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_large_budget_changes_nothing_and_it_is_said(model_directory: Path, tmp_path: Path) -> None:
    plan = plan_job(recipe(model_directory, tmp_path, "4GiB")).plan
    assert plan.streamed_tokens is None
    assert "whole" in {item.value for item in plan.resolved if item.name == "model in memory"}


@pytest.mark.parametrize(
    ("sections", "where", "what"),
    [
        ({"method": {"kind": "full"}}, "method", "plain LoRA"),
        ({"method": {"kind": "lora", "dora": True}}, "method", "plain LoRA"),
        ({"method": {"kind": "lora", "targets": ["lm_head"]}}, "method.targets", "not in memory"),
        ({"train": {"packing": False}}, "train.packing", "packed"),
        ({"train": {"optimizer": "adamw-8bit"}}, "train.optimizer", "8-bit"),
        ({"train": {"gradient_checkpointing": False}}, "train.gradient_checkpointing", "again"),
        ({"train": {"generate_every": 2}}, "train.generate_every", "whole model"),
        ({"evaluate": {"metrics": ["f1"]}}, "evaluate.metrics", "whole model"),
        ({"budget": "100MB"}, "budget.memory", r"needs about \d+ MB"),
    ],
)
def test_what_a_small_memory_cannot_do_is_one_error(
    sections: dict[str, Any], where: str, what: str, model_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=what) as told:
        plan_job(recipe(model_directory, tmp_path, **sections))
    assert told.value.where == where and told.value.fix


def test_the_smallest_budget_that_is_named_would_do(model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as told:
        plan_job(recipe(model_directory, tmp_path, "100MB"))
    smallest = next(word for word in cast(str, told.value.fix).split() if word.endswith("MB"))
    assert plan_job(recipe(model_directory, tmp_path, smallest)).plan.streamed_tokens


def test_an_architecture_that_cannot_be_streamed_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gpt2"):
        plan_job(recipe(build_model(tmp_path / "model", "gpt2"), tmp_path))


@pytest.mark.parametrize("size", ["lots", "5 apples", "-3MB", 0, True, "0MB"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match=r"budget\.memory"):
        check_recipe({"model": "x", "data": {"train": "y"}, "budget": {"memory": size}}, "test")


def test_sizes() -> None:
    def read(size: Any) -> int | None:
        return check_recipe(
            {"model": "x", "data": {"train": "y"}, "budget": {"memory": size}}, "test"
        ).budget.memory_bytes

    assert [read(size) for size in ("512MB", "2GiB", "1.5 gb", 77, "8B")] == [512 * 10**6, 2**31, 1500 * 10**6, 77, 8]


SMALL = """
import json, sys
from tunesmith.recipe_file import check_recipe
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.usage import process_peak_bytes
run = finetune(check_recipe(json.loads(sys.argv[1]), "test"))
heavy = [name for name in ("transformers.modeling_utils", "torch._dynamo", "sympy", "datasets") if name in sys.modules]
print(json.dumps([process_peak_bytes(), heavy, run.report["measured"]["peak_bytes"], run.report["warnings"]]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the system's count of resident memory")
def test_a_process_stays_within_its_budget_and_imports_nothing_large(model_directory: Path, tmp_path: Path) -> None:
    asked = recipe(model_directory, tmp_path, "480MB", train={"dtype": "fp32"})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SMALL, asked.model_dump_json()]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    peak, heavy, measured, warnings = json.loads(said.stdout.splitlines()[-1])
    assert heavy == []
    assert measured <= peak < 480e6, warnings
