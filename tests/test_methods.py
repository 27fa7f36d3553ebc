"""What the methods make trainable, against PEFT; what their settings mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_cases import (
    TIED,
    Case,
    adapted,
    assert_moved,
    assert_same,
    each_case,
    logits_of,
    peft_logits,
    peft_name,
)
from tiny import shake, tiny, tiny_config
from tunesmith.base import InputError
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.methods.low_rank import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore")


@each_case
def test_same_logits_and_gradients_as_peft(case: Case) -> None:
    ours = adapted(case)
    theirs = get_peft_model(case.base(), LoraConfig(**{"lora_alpha": 32, **case.peft}))
    own = case.ours.trained_tensors(ours)
    twins = dict(theirs.named_parameters())
    trainable = {name for name, parameter in twins.items() if parameter.requires_grad}
    assert {peft_name(name) for name in own} == trainable
    with torch.no_grad():
        for name, tensor in own.items():
            twins[peft_name(name)].copy_(tensor)
    found, expected = logits_of(ours), peft_logits(theirs)
    assert_same(found, expected)
    with torch.no_grad():
        assert_moved(found, logits_of(case.base()))
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, tensor in own.items():
        gradient, reference = tensor.grad, twins[peft_name(name)].grad
        assert gradient is not None and reference is not None and reference.any()
        assert_same(gradient, reference, 5e-5)
    assert not [name for name, p in ours.named_parameters() if p.grad is not None and not p.requires_grad]


def test_a_fresh_adapter_changes_nothing_and_starts_as_the_paper_says() -> None:
    model = tiny()
    with torch.no_grad():
        before = logits_of(model)
        Lora(rank=4).adapt(model)
        assert_same(logits_of(model), before)
    for layer in lora_layers(model).values():
        assert layer.lora_A.any() and not layer.lora_B.any()
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert set(trainable_parameters(model)) == {
        f"{name}.{which}" for name in lora_layers(model) for which in ("lora_A", "lora_B")
    }


def test_dropout_is_for_training_only() -> None:
    model = tiny()
    Lora(rank=4, dropout=0.5).adapt(model)
    shake(model)
    with torch.no_grad():
        assert torch.equal(logits_of(model), logits_of(model))
        model.train()
        assert not torch.allclose(logits_of(model), logits_of(model))


@pytest.mark.parametrize(
    ("model_type", "targets", "expected"),
    [
        ("llama", "all-linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("llama", "attention", "q_proj k_proj v_proj o_proj"),
        ("llama", "mlp", "gate_proj up_proj down_proj"),
        ("llama", "qv", "q_proj v_proj"),
        ("llama", [r"mlp\..*", "q_proj"], "gate_proj up_proj down_proj q_proj"),
        ("gpt2", "all-linear", "c_attn c_proj c_fc"),
        ("gpt2", "mlp", "c_fc c_proj"),
        ("phi3", "attention", "qkv_proj o_proj"),
        ("phi3", "mlp", "gate_up_proj down_proj"),
    ],
    ids=str,
)
def test_targets(model_type: str, targets: str | list[str], expected: str) -> None:
    model = tiny(model_type)
    Lora(targets=targets).adapt(model)
    layers = lora_layers(model)
    assert {name.rsplit(".", 1)[-1] for name in layers} == set(expected.split())
    assert {name.split(".")[2] for name in layers} == {"0", "1"}
    assert "lm_head" not in layers
    inside = {name for name in layers if "attn" in name}
    assert inside == (set() if targets == "mlp" else set(layers) if targets == "attention" else inside)


@pytest.mark.parametrize(
    ("model_type", "method", "said"),
    [
        ("llama", {"targets": ["q_prj"]}, ["'q_prj' matches no", "did you mean 'q_proj'", "v_proj ×2", "lm_head ×1"]),
        ("llama", {"targets": "atention"}, ["did you mean 'attention'"]),
        ("llama", {"targets": ["q_proj", "nothing"]}, ["'nothing' matches no"]),
        ("llama", {"targets": ["("]}, ["not a regular expression"]),
        ("llama", {"targets": ["(?i)Q_PROJ"]}, ["not a regular expression", "flags"]),
        ("phi3", {"targets": "qv"}, ["finds no layers", "one fused projection: use `attention`", "qkv_proj ×2"]),
        ("gpt2", {"targets": "qv"}, ["finds no layers", "c_attn ×2"]),
        ("llama", {"targets": "qv", "rank_pattern": {"o_proj": 2}}, ["'o_proj' matches none", "q_proj ×2"]),
        ("llama", {"targets": "qv", "alpha_pattern": {"o_proj": 2}}, ["'o_proj' matches none", "alpha_pattern"]),
        ("llama", {"modules_to_save": ["lm_hed"]}, ["'lm_hed' matches no module", "did you mean 'lm_head'"]),
        ("llama", {"modules_to_save": ["act_fn"]}, ["'act_fn' matches no module with weights"]),
        ("llama", {"targets": "qv", "modules_to_save": ["q_proj"]}, ["a target of the adapter already"]),
        ("llama", {"targets": "qv", "modules_to_save": ["self_attn"]}, ["a target of the adapter already"]),
        (
            "llama",
            {"targets": ["lm_head"], "modules_to_save": ["embed_tokens"]},
            ["lm_head is a target of the adapter already", "weights that it shares"],
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(model_type: str, method: dict[str, Any], said: list[str]) -> None:
    model = tiny(model_type, tie_word_embeddings=True)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError) as caught:
        Lora(**method).adapt(model)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert str(caught.value.where).startswith("method.")
    assert [name for name, _ in model.named_modules()] == before


def test_experts_that_get_no_adapter_are_mentioned() -> None:
    assert "expert weights" in " ".join(Lora().adapt(tiny("mixtral")))
    assert Lora().adapt(tiny()) == []


@pytest.mark.parametrize(("targets", "rank", "trainable"), [("qv", 8, 4_194_304), ("attention", 16, 16_777_216)])
def test_counts_of_llama_2_7b_without_its_weights(targets: str, rank: int, trainable: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=11008))
    base = sum(parameter.numel() for parameter in model.parameters())
    assert base == 6_738_415_616
    Lora(rank=rank, targets=targets).adapt(model)
    assert sum(parameter.numel() for parameter in trainable_parameters(model).values()) == trainable
    assert sum(parameter.numel() for parameter in model.parameters()) == base + trainable
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("method", [Full(), Lora(modules_to_save=["lm_head"]), Lora(targets=["embed_tokens"])], ids=str)
def test_every_method_adapts_without_storage(method: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False)).to(torch.bfloat16)
    method.adapt(copy.deepcopy(model))
    real = tiny(tie_word_embeddings=False)
    method.adapt(model)
    method.adapt(real)
    assert {n: p.shape for n, p in trainable_parameters(model).items()} == {
        n: p.shape for n, p in trainable_parameters(real).items()
    }


def test_full_trains_everything_in_fp32(tmp_path: Path) -> None:
    model = tiny(dtype=torch.bfloat16, **TIED)
    model.requires_grad_(False)
    Full().adapt(model)
    assert set(trainable_parameters(model)) == {name for name, _ in model.named_parameters()}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(Full().trained_tensors(model)) == len(list(model.parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        Full().save(model, tmp_path, base="b")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert reloaded.dtype == torch.float32
        assert torch.equal(logits_of(reloaded), logits_of(model))
    assert not list(tmp_path.glob("*.bin"))


def test_full_refuses_quantized_weights() -> None:
    model: Any = tiny()
    model.is_quantized = True
    with pytest.raises(InputError, match="quantized"):
        Full().adapt(model)
