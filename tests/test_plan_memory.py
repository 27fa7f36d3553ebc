"""Counts and bytes before anything is loaded: the worked examples of the documents, corrected, and what blocks keep."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tiny import random_rows, tiny, tiny_config
from tunesmith.batch import pack
from tunesmith.methods import Adapter, Full, Lora, Prefix, Prompt, trainable_parameters
from tunesmith.models.measure import meta_model, shape_of
from tunesmith.models.parts import parameters_by_part
from tunesmith.objectives import Supervised
from tunesmith.plan.activations import kept_by_token
from tunesmith.plan.memory import Load, counted, predict_memory
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe
from tunesmith.resolved import Memory

BILLION = 10**9


def config(kind: str, hidden: int, layers: int, **more: Any) -> Any:
    return AutoConfig.for_model(kind, hidden_size=hidden, num_hidden_layers=layers, **more)


LLAMA2_7B = {"intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
LARGE = {
    "llama2-7b": (config("llama", 4096, 32, num_key_value_heads=32, **LLAMA2_7B), 6_738_415_616),
    "llama3-8b": (
        config("llama", 4096, 32, intermediate_size=14336, num_attention_heads=32, **LLAMA3),
        8_030_261_248,
    ),
    "llama3-70b": (
        config("llama", 8192, 80, intermediate_size=28672, num_attention_heads=64, **LLAMA3),
        70_553_706_496,
    ),
    "qwen2-7b": (
        config(
            "qwen2", 3584, 28, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
            vocab_size=152064, tie_word_embeddings=False,
        ),
        7_615_616_512,
    ),
}  # fmt: skip


def trained_by(method: Any, model: nn.Module) -> int:
    method.adapt(model)
    return sum(weight.numel() for weight in trainable_parameters(model).values())


@pytest.mark.parametrize("name", LARGE)
def test_large_models_are_counted_to_the_weight_from_their_configuration(name: str) -> None:
    settings, expected = LARGE[name]
    started = time.perf_counter()
    parts = parameters_by_part(meta_model(settings, name))
    assert sum(parts.values()) == expected
    assert parts["other"] == 0 and parts["head"] == parts["embeddings"]
    assert time.perf_counter() - started < 6


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Lora(rank=8, targets="qv"), 4_194_304),  # the documents print this for r = 16 and for four modules
        (Lora(rank=16, targets="qv"), 8_388_608),
        (Lora(rank=16, targets="attention"), 16_777_216),
        (Prefix(tokens=20), 2 * 20 * 4096 * 32),  # keys and values: 5.24 M, not 2.6 M
        (Prompt(tokens=20), 20 * 4096),
        # Two bottlenecks of 64 a layer with their biases, which 33.5 M leaves out.
        (Adapter(size=64), 32 * 2 * (2 * 4096 * 64 + 64 + 4096)),
    ],
    ids=["qv-8", "qv-16", "attention-16", "prefix", "prompt", "adapter"],
)
def test_what_methods_train_of_llama_2_7b(method: Any, expected: int) -> None:
    assert trained_by(method, meta_model(LARGE["llama2-7b"][0], "7b")) == expected


def test_prompt_tuning_on_gpt2_trains_15360_weights_and_prefixes_need_less_with_grouped_queries() -> None:
    assert trained_by(Prompt(tokens=20), meta_model(AutoConfig.for_model("gpt2"), "gpt2")) == 20 * 768 == 15_360
    assert trained_by(Prefix(tokens=20), meta_model(LARGE["llama3-8b"][0], "8b")) == 2 * 20 * 1024 * 32


def test_full_fine_tuning_takes_16_bytes_a_weight_and_the_convention_says_which() -> None:
    """8B in the documents: 74 GB with everything in 16 bits but Adam in 32 GB; counted with fp32 masters it is 128."""
    memory = memory_of("llama3-8b", {"kind": "full"})
    count = LARGE["llama3-8b"][1]
    assert memory.weights == memory.gradients == 4 * count and memory.optimizer == 8 * count
    assert memory.weights + memory.gradients + memory.optimizer == 16 * count
    assert "16 bytes" in memory.convention


def test_lora_and_qlora_hold_the_base_in_16_and_4_bits() -> None:
    lora, qlora = memory_of("llama2-7b", {"kind": "lora"}), memory_of("llama2-7b", {"kind": "qlora"})
    trained = lora.gradients
    assert (lora.weights - trained) / BILLION == pytest.approx(13.48, abs=0.01)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert qlora.constants == pytest.approx(linears * 0.127 / 8, rel=1e-3)
    assert qlora.weights - trained == pytest.approx(linears / 2 + 2 * (LARGE["llama2-7b"][1] - linears), rel=1e-6)
    assert qlora.peak_bytes < lora.peak_bytes


def memory_of(name: str, method: dict[str, Any], device: str = "cuda", **changes: Any) -> Memory:
    recipe: Recipe = check_recipe({"model": "m", "data": {"train": "t"}, "method": method}, "test")
    model = meta_model(LARGE[name][0], name)
    shape, full = shape_of(model), recipe.method.trains_all
    recipe.method.adapt(model)
    load = replace(Load(tokens=1024, targets=256, longest=512, checkpointing=False, device=device), **changes)
    return predict_memory(counted(model, shape, recipe, "bf16", "fp32" if full else "bf16"), recipe, load)


def test_phases_add_up_and_the_largest_is_the_peak() -> None:
    memory = memory_of("llama3-8b", {"kind": "lora"}, "cpu", judged=4096, answers=8, answer_tokens=600)
    totals = {phase.name: phase.total for phase in memory.phases}
    assert {"loading", "scoring the base", "answering with the base", "training", "writing a checkpoint"} <= set(totals)
    assert memory.peak_bytes == max(totals.values()) == totals[memory.peak_phase]
    assert memory.cache == 2 * 32 * 2048 * 8 * 600  # 16 bits, layers, keys and values of 8 heads, answers, tokens


def test_checkpointing_keeps_the_inputs_of_blocks_and_recomputes_one() -> None:
    plain = memory_of("llama3-8b", {"kind": "lora"})
    again = memory_of("llama3-8b", {"kind": "lora"}, checkpointing=True)
    assert again.activations < plain.activations / 5 and again.weights == plain.weights


@pytest.mark.parametrize("method", [Lora(rank=4), Lora(rank=4, targets="qv"), Full()], ids=["lora", "qv", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_the_forward_pass_keeps_is_what_is_predicted(kind: str, method: Any) -> None:
    """Every tensor that autograd is asked to keep, counted once, less the weights and what the head keeps."""
    model = tiny(kind)
    method.adapt(model)
    batch = pack(random_rows([40, 56]))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype != torch.long:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    Supervised().loss(model, batch)  # looks at the model once
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = Supervised().loss(model, batch)["nll"]
    assert loss.requires_grad
    predicted = batch.tokens * kept_by_token(model, shape_of(model), "fp32", "fp32").blocks
    predicted += batch.tokens * 2 * 32 * 4  # the last norm, and what the head reads
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.06)  # rotary tables, the head


def test_parts_of_an_encoder_and_of_gpt2_are_told_apart() -> None:
    bert = parameters_by_part(meta_model(tiny_config("bert"), "bert"))
    gpt2 = parameters_by_part(meta_model(AutoConfig.for_model("gpt2"), "gpt2"))
    assert gpt2["attention"] == 12 * (768 * 2304 + 2304 + 768 * 768 + 768) and gpt2["other"] == 0
    assert gpt2["mlp"] == 12 * (2 * 768 * 3072 + 3072 + 768) and gpt2["norms"] == 25 * 2 * 768
    assert bert["attention"] == 2 * 4 * (32 * 32 + 32) and bert["mlp"] == 2 * (2 * 32 * 48 + 48 + 32)
