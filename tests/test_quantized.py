"""Bases in 4 bits: against bitsandbytes' own layers and PEFT's QLoRA, before and after evaluation, saved and loaded."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tiny import random_rows, shake, tiny
from tunesmith.base import InputError
from tunesmith.batch import pack
from tunesmith.methods import Full, Lora, QLora, trainable_parameters
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.low_rank import lora_layers
from tunesmith.methods.quantized_lora import base_read
from tunesmith.models.decoder import Decoder, decoder_of
from tunesmith.models.forward import next_token_logits
from tunesmith.models.load import load_model
from tunesmith.models.projection import project, projection_of
from tunesmith.models.quantized import (
    NO_OTHER_KERNEL,
    PackedWeight,
    packed_weight,
    quantization,
    silence_optional_kernel,
)
from tunesmith.objectives import Supervised

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = pack(random_rows((9, 17, 30)))
CPU = torch.device("cpu")
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
every_kind = pytest.mark.parametrize(("kind", "double"), KINDS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny(initializer_range=0.1, dtype=torch.bfloat16).save_pretrained(path)
    return path


def loaded(path: Path, kind: str = "nf4", double: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(str(path), dtype=dtype, device=CPU, quantized=quantization(kind, double))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return next_token_logits(model.eval(), BATCH, torch.arange(BATCH.tokens)).float()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train().zero_grad()
    Supervised().loss(model, BATCH)["nll"].backward()
    found = trainable_parameters(model).items()
    return {name: parameter.grad.clone() for name, parameter in found if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_a_packed_weight_computes_what_bitsandbytes_does(kind: str, double: bool, dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    layer: Any = Linear4bit(48, 96, bias=True, compute_dtype=dtype, quant_type=kind, compress_statistics=double)
    weight = torch.randn(96, 48, dtype=dtype)
    layer.weight = Params4bit(weight, quant_type=kind, compress_statistics=double, module=layer)
    layer = layer.to("cpu").train()
    layer.bias.data = layer.bias.data.to(dtype)
    x, slope = torch.randn(20, 48).to(dtype), torch.randn(20, 96).to(dtype)
    results = []
    for run in (lambda given: layer(given), lambda given: project(given, (layer,))[0]):
        given = x.clone().requires_grad_()
        output = run(given)
        output.backward(slope)
        results.append((output.detach(), given.grad))
    assert isinstance(packed_weight(layer), PackedWeight)
    exact = 1e-5 if dtype == torch.float32 else 2e-2
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


@every_kind
def test_the_fused_blocks_take_quantized_layers(saved: Path, kind: str, double: bool) -> None:
    model = loaded(saved, kind, double)
    assert isinstance(decoder_of(model), Decoder)
    row = BATCH.token_ids[None, :9]
    with torch.no_grad():
        expected = model(input_ids=row).logits[0]
    assert torch.allclose(logits(model)[:9], expected, atol=1e-4)
    assert not torch.allclose(expected, logits(load_model(str(saved), dtype=torch.float32, device=CPU))[:9], atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_gradients_are_the_same_after_an_evaluation(saved: Path, kind: str) -> None:
    """bitsandbytes lays weights out anew at the first pass in evaluation on some CPUs, and has no gradient then."""
    model = loaded(saved, kind, dtype=torch.bfloat16)
    Lora(rank=4).adapt(model)
    shake(model)
    before = gradients(model)
    logits(model)
    with torch.no_grad():
        next_token_logits(model, pack(random_rows((9,)), "padded"), torch.arange(9))
    after = gradients(model)
    assert all(bool(gradient.any()) for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_peft(saved: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded(saved, dtype=dtype)
    method = QLora(rank=4, alpha=1.0)
    method.adapt(model)
    shake(model)
    method.save(model, tmp_path, base=str(saved))
    found = gradients(model)
    theirs: Any = PeftModel.from_pretrained(loaded(saved, dtype=dtype), str(tmp_path), is_trainable=True).train()
    total = torch.zeros(())
    for start, length, _ in BATCH.segments.tolist():
        ids = BATCH.token_ids[start : start + length]
        weights = BATCH.tensors["target_weights"][start : start + length]
        scores = theirs(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        total = total - (scores[:-1].gather(1, ids[1:, None])[:, 0] * weights[1:]).sum()
    total.backward()
    named = dict(theirs.named_parameters())
    expected = {name: named[f"base_model.model.{name}.default.weight"].grad for name in found}
    if dtype == torch.float32:
        assert error(found, expected) < 1e-4
        return
    wide = loaded(saved)
    load_adapter(wide, tmp_path)
    exact = gradients(wide)
    assert error(found, exact) < 1.5 * error(expected, exact) < 0.2


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    apart = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return (apart / sum(float(tensor.square().sum()) for tensor in exact.values())) ** 0.5


def test_a_model_saved_in_4_bits_is_known_and_not_rounded_again(saved: Path, tmp_path: Path) -> None:
    model = loaded(saved, "nf4", False)
    expected = logits(model)
    model.save_pretrained(tmp_path / "small")
    again = load_model(str(tmp_path / "small"), dtype=torch.float32, device=CPU)
    assert torch.equal(logits(again), expected)
    same = loaded(tmp_path / "small", "nf4", False)
    assert torch.equal(logits(same), expected)
    with pytest.raises(InputError, match=r"stored as nf4, scales in fp32 already"):
        loaded(tmp_path / "small", "fp4")
    with pytest.raises(InputError, match="whole"):
        Full().adapt(again)
    Lora(rank=2).adapt(again)
    assert all(bool(gradient.any()) for name, gradient in gradients(again).items() if "lora_B" in name)


def test_loftq_starts_closer_to_the_base_as_it_was(saved: Path) -> None:
    whole = logits(load_model(str(saved), dtype=torch.float32, device=CPU))
    model = loaded(saved)
    rounded = logits(model)
    errors = [float((rounded - whole).norm())]
    for rank in (2, 8, 16):
        started = loaded(saved)
        Lora(rank=rank, init="loftq").adapt(started)
        errors.append(float((logits(started) - whole).norm()))
        with without_adapter(started):
            assert torch.equal(logits(started), rounded)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_loftq_is_the_best_approximation_of_what_was_lost(saved: Path) -> None:
    whole, model = load_model(str(saved), dtype=torch.float32, device=CPU), loaded(saved)
    Lora(rank=4, alpha=3.0, init="loftq").adapt(model)
    for name, layer in lora_layers(model).items():
        packed = packed_weight(layer.base)
        assert packed is not None
        lost = whole.get_submodule(name).weight - packed.to(torch.float32)
        best = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        assert float((lost - layer.delta()).norm()) < 1.02 * float(best), name


def test_an_adapter_says_what_it_was_trained_over(saved: Path, tmp_path: Path) -> None:
    for name, method in {"plain": Lora(rank=2), "bound": Lora(rank=2, init="loftq")}.items():
        model = loaded(saved, "fp4")
        method.adapt(model)
        method.save(model, tmp_path / name, base=str(saved))
        said = base_read(tmp_path / name)
        assert said.quantized == quantization("fp4") and said.bound == (name == "bound")
    unquantized = tiny()
    Lora(rank=2).adapt(unquantized)
    Lora(rank=2).save(unquantized, tmp_path / "none", base=str(saved))
    assert base_read(tmp_path / "none").quantized is None


def test_peft_reads_an_adapter_that_loftq_started(saved: Path, tmp_path: Path) -> None:
    model = loaded(saved)
    method = Lora(rank=4, init="loftq")
    method.adapt(model)
    method.save(model, tmp_path, base=str(saved))
    theirs: Any = PeftModel.from_pretrained(loaded(saved), str(tmp_path)).eval()
    with torch.no_grad():
        found = theirs(input_ids=BATCH.token_ids[None, :9]).logits[0]
    assert torch.allclose(found, logits(model)[:9], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Full(), "trained whole"),
        (Lora(init="pissa"), "pissa takes a part off"),
        (Lora(init="olora"), "olora takes a part off"),
        (Lora(quantization_aware="q4_0"), "needs the base unrounded"),
        (Lora(init="loftq", targets=["embed_tokens"]), "not stored in 4 bits"),
        (Lora(init="loftq", dora=True), "DoRA rescales that sum"),
        (Lora(dora=True, targets=["embed_tokens"]), "DoRA cannot change quantized embeddings"),
    ],
)
def test_what_a_quantized_base_does_not_allow(saved: Path, method: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        method.adapt(loaded(saved))


def test_merging_into_quantized_weights_is_refused(saved: Path) -> None:
    model = loaded(saved)
    Lora(rank=2).adapt(model)
    with pytest.raises(InputError, match="quantized"):
        merge_layers(model)


def test_dora_trains_over_a_quantized_base(saved: Path) -> None:
    model = loaded(saved)
    Lora(rank=2, dora=True).adapt(model)
    logits(model)
    assert all(bool(gradient.any()) for name, gradient in gradients(model).items() if "lora_B" in name)
    reference = get_peft_model(
        loaded(saved), LoraConfig(r=2, lora_alpha=32, use_dora=True, target_modules="all-linear")
    )
    assert len(gradients(model)) == len([p for p in reference.parameters() if p.requires_grad])


def test_only_the_known_complaint_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    silence_optional_kernel()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning(f"{NO_OTHER_KERNEL}. Please install it")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: a broken file")
    assert [record.getMessage() for record in caplog.records] == [
        "Failed to load CPU gemm_4bit_forward from kernels-community: a broken file"
    ]


def test_a_copy_of_a_packed_layer_is_one_too(saved: Path) -> None:
    layer = copy.deepcopy(loaded(saved).model.layers[0].mlp.up_proj)
    projection = projection_of(layer)
    assert projection is not None and isinstance(projection.weight, PackedWeight)
