"""Folding an adapter into its base, and the check that the merged model is the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_cases import (
    Case,
    adapted,
    assert_same,
    each_case,
    each_whole,
    logits_of,
    randomise,
    trained_whole,
)
from tiny import random_rows, shake, tiny
from tunesmith.base import InputError
from tunesmith.compose.merge import merge, merge_and_check
from tunesmith.methods import Lora
from tunesmith.methods.adapted import without_adapter
from tunesmith.methods.low_rank import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore")


@each_case
def test_merged_equals_adapter_and_is_plain(case: Case, tmp_path: Path) -> None:
    model, base = adapted(case), case.base()
    with torch.no_grad():
        expected = logits_of(model)
        merge(model)
        own_attention = model.config._attn_implementation
        assert_same(logits_of(model), expected, 1e-4)
    assert not lora_layers(model)
    assert own_attention == "sdpa"
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    targets = {f"{name}.weight" for name in lora_layers(adapted(case))}
    assert changed == targets
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same(logits_of(reloaded), expected, 1e-4)


@each_whole
def test_modules_trained_whole_beside_dora_are_merged(
    whole: list[str], overrides: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT keeps such a module and its trained copy in a wrapper, which must not outlive the adapter."""
    base: Any = tiny(**overrides)
    model: Any = trained_whole(Lora(rank=4, targets="attention", dora=True, modules_to_save=whole), overrides)
    randomise(model)
    with torch.no_grad():
        expected = logits_of(model)
        with without_adapter(model):
            assert_same(logits_of(model), logits_of(base))
        assert_same(logits_of(model), expected)
        assert merge_and_check(model, PROMPTS, {2}).passed
        assert_same(logits_of(model), expected, 1e-4)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert_same(logits_of(reloaded), expected, 1e-4)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_quantized_weights_are_not_merged() -> None:
    model = tiny()
    Lora(targets="qv").adapt(model)
    shake(model)
    last = list(lora_layers(model).values())[-1]
    last.base.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="quantized"):
        merge(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


PROMPTS = [row.token_ids.tolist() for row in random_rows([7, 4, 12])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_merge_check_passes_for_a_right_merge(dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype)
    Lora(rank=4, targets="qv").adapt(model)
    check = merge_and_check(shake(model), PROMPTS, {2})
    assert check.passed and check.layers == 4 and check.prompts == 3
    assert check.differs_from_base > 10 * check.mean_kl
    assert check.same_tokens == 1.0 or dtype == torch.bfloat16
    assert check.as_json()["largest_logit_difference"] == check.largest_logit_difference


def test_the_merge_check_fails_for_an_adapter_that_does_nothing() -> None:
    model = tiny()
    Lora(rank=4, targets="qv").adapt(model)
    assert not merge_and_check(model, PROMPTS, {2}).passed


def test_the_merge_check_fails_for_a_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: Any) -> Tensor:
        return (layer.lora_B @ layer.lora_A) * layer.scale * 0.9

    model = tiny()
    Lora(rank=4, targets="qv").adapt(model)
    monkeypatch.setattr("tunesmith.methods.low_rank.LoraLayer.delta", wrong)
    check = merge_and_check(shake(model), PROMPTS, {2})
    assert not check.passed and check.mean_kl > 1e-5


def test_non_finite_logits_never_pass_the_merge_check() -> None:
    model = tiny()
    Lora(rank=4, targets="qv").adapt(model)
    shake(model)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B.fill_(float("nan"))
    assert not merge_and_check(model, PROMPTS, {2}).passed
