"""Adapters on disk: what we save PEFT loads, what PEFT saves we load, and what neither should is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_cases import (
    BATCH,
    TIED,
    UNTIED,
    Case,
    adapted,
    assert_moved,
    assert_same,
    each_case,
    each_whole,
    logits_of,
    peft_logits,
    randomise,
    trained_whole,
)
from tiny import random_rows, shake, tiny
from tunesmith.base import InputError
from tunesmith.compose.merge import merge, merge_and_check
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.methods.adapter_files import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


@each_case
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    ours = adapted(case)
    case.ours.save(ours, tmp_path, base="somewhere/base")
    with torch.no_grad():
        expected = logits_of(ours)
        assert_same(peft_logits(PeftModel.from_pretrained(case.base(), tmp_path)), expected)
        again = case.base()
        loaded = load_adapter(again, tmp_path)
        assert_same(logits_of(again), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    assert config["fan_in_fan_out"] is (case.model_type == "gpt2" and "head" not in case.name)
    loaded.save(again, tmp_path / "second", base="somewhere/base")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with torch.no_grad():
        assert_same(peft_logits(PeftModel.from_pretrained(case.base(), tmp_path / "second")), expected)


@each_case
def test_what_peft_saves_we_load(case: Case, tmp_path: Path) -> None:
    theirs = get_peft_model(case.base(), LoraConfig(**{"lora_alpha": 32, **case.peft}))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    # Not the model that was saved: PEFT sorts patterns when it writes them, and the first match wins.
    again = PeftModel.from_pretrained(case.base(), tmp_path)
    ours = case.base()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        found = logits_of(ours)
        assert_same(found, peft_logits(again))
        assert_moved(found, logits_of(case.base()))


@each_whole
def test_whole_modules_beside_adapters(whole: list[str], overrides: dict[str, Any], tmp_path: Path) -> None:
    method = Lora(rank=4, targets="qv", modules_to_save=whole)
    model, base = trained_whole(method, overrides), tiny(**overrides)
    with torch.no_grad():
        expected = logits_of(model)
        method.save(model, tmp_path, base="b")
        assert_same(peft_logits(PeftModel.from_pretrained(tiny(**overrides), tmp_path)), expected)
        again = tiny(**overrides)
        load_adapter(again, tmp_path)
        assert_same(logits_of(again), expected)
        merge(again)
        assert_same(logits_of(again), expected, 1e-4)
        assert again.state_dict().keys() == base.state_dict().keys()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is (overrides is TIED)
    with torch.no_grad():
        again.save_pretrained(tmp_path / "merged")
        assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, 1e-4)
    if overrides is TIED and "norm" not in whole[0]:
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@pytest.mark.parametrize("tying", [False, True], ids=["copies", "ensure_weight_tying"])
@pytest.mark.parametrize("kind", ["modules_to_save", "target_modules"])
@each_whole
def test_whole_modules_from_peft(
    whole: list[str], overrides: dict[str, Any], kind: str, tying: bool, tmp_path: Path
) -> None:
    names = [name.replace(r"model\.", "model.") for name in whole]
    if kind == "target_modules" and "norm" in whole[0]:
        pytest.skip("PEFT has no LoRA of a norm")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "r": 4, "ensure_weight_tying": tying}
    settings[kind] = names if kind == "modules_to_save" else ["q_proj", *names]
    theirs = get_peft_model(tiny(**overrides), LoraConfig(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft_logits(PeftModel.from_pretrained(tiny(**overrides), tmp_path).eval())
        ours = tiny(**overrides)
        method = load_adapter(ours, tmp_path)
        assert_same(logits_of(ours), expected)
        method.save(ours, tmp_path / "again", base="b")
        second = tiny(**overrides)
        load_adapter(second, tmp_path / "again")
        assert_same(logits_of(second), expected)
        merge(second)
        assert_same(logits_of(second), expected, 1e-4)


@pytest.mark.parametrize("whole", [["embed_tokens"], ["lm_head"], [r"model\.norm"], ["mlp"]], ids=str)
@pytest.mark.parametrize("overrides", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_whole_modules_in_a_bf16_model(whole: list[str], overrides: dict[str, Any], dora: bool, tmp_path: Path) -> None:
    """Trained weights are fp32, the rest is not; the model runs without autocast, for validation and generation."""
    method = Lora(rank=4, targets="attention", modules_to_save=whole, dora=dora)
    model = trained_whole(method, overrides, torch.bfloat16)
    randomise(model)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    expected = logits_of(model)
    assert expected.dtype == torch.bfloat16
    expected.float().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    prompt = BATCH.token_ids[:5].tolist()
    generate(model, [prompt], Sampling(3), stop_ids={2}, batch_size=1, progress=lambda *_: None)
    method.save(model, tmp_path, base="b")
    again = tiny(dtype=torch.bfloat16, **overrides)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits_of(again), expected)
    copied = copy.deepcopy(again)
    check = merge_and_check(again, [row.token_ids.tolist() for row in random_rows([7, 9])], {2})
    assert check.passed, check
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in again.modules())
    assert trainable_parameters(copied) and not trainable_parameters(again)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": "lora_only"},
        {"layer_replication": [[0, 2], [1, 2]]},
    ],
    ids=str,
)
def test_variants_of_lora_that_would_be_silently_wrong_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **change})
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=next(iter(change))):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"], ids=str)
def test_starts_that_leave_the_base_alone_are_loaded(start: Any, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert_same(logits_of(ours), peft_logits(theirs.eval()))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_parameters": ["lm_head.weight"], "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_variants_that_only_peft_computes_are_loaded_into_its_layers(change: dict[str, Any], tmp_path: Path) -> None:
    theirs = get_peft_model(tiny(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **change}))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert_same(logits_of(ours), peft_logits(theirs.eval()))


def test_adapters_of_another_kind_are_loaded(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert_same(logits_of(ours), peft_logits(theirs.eval()))


def test_adapters_that_stand_on_more_than_layers_are_refused(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="adalora"):
        load_adapter(tiny(), tmp_path)


def saved_adapter(directory: Path) -> Path:
    method = Lora(rank=4, targets="qv")
    model = tiny()
    method.adapt(model)
    method.save(shake(model), directory, base="the/base")
    return directory


def test_damaged_adapters_are_said_plainly(tmp_path: Path) -> None:
    weights = saved_adapter(tmp_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot read the adapter's weights"):
        load_adapter(tiny(), tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="cannot read the adapter's weights"):
        load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the adapter's settings"):
        load_adapter(tiny(), tmp_path)


def test_adapters_of_other_models_are_refused(tmp_path: Path) -> None:
    saved_adapter(tmp_path)
    with pytest.raises(InputError, match="which this model does not have") as caught:
        load_adapter(tiny("gpt2"), tmp_path)
    assert "the/base" in str(caught.value)
    with pytest.raises(InputError, match=r"layers\.1.*does not have"):
        load_adapter(tiny(num_hidden_layers=1), tmp_path)
    with pytest.raises(InputError, match=r"has shape \[4, 32\], the model needs \[4, 64\]"):
        load_adapter(tiny(hidden_size=64), tmp_path)


def test_an_adapter_over_other_embeddings_is_refused(tmp_path: Path) -> None:
    base = tiny()
    base.resize_token_embeddings(100)
    get_peft_model(base, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another model.embed_tokens than this model has.*\[100, 32\]"):
        load_adapter(tiny(), tmp_path)
    get_peft_model(tiny(seed=1), LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another model\.embed_tokens"):
        load_adapter(tiny(), tmp_path)


def test_an_adapted_model_is_not_adapted_again(tmp_path: Path) -> None:
    model = tiny()
    Lora(targets="qv").adapt(model)
    with pytest.raises(InputError, match="has an adapter already"):
        Lora(targets="qv").adapt(model)
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapter(model, saved_adapter(tmp_path))


def test_saved_weights_must_fit(tmp_path: Path) -> None:
    method, model = Lora(rank=4, targets="qv"), tiny()
    method.adapt(model)
    tensors = {name: tensor.detach().clone() for name, tensor in method.trained_tensors(model).items()}
    name = next(iter(tensors))
    for change, said in (
        ({name: torch.zeros(1, 1)}, "has shape"),
        ({"base_model.model.other": torch.zeros(1)}, "1 unknown"),
    ):
        with pytest.raises(InputError, match=said):
            method.load_trained(model, tensors | change, where="there")
    del tensors[name]
    with pytest.raises(InputError, match="1 missing"):
        method.load_trained(model, tensors, where="there")
