"""Layers that read one input, as one function: its values and gradients against the formula under autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.methods.low_rank import LoraLayer
from tunesmith.models.projection import FEW, project, projection_of

TOKENS, WIDTH = 11, 12
OUT = (12, 6, 6)
RANKS = {"plain": (0, 0, 0), "all": (4, 4, 4), "some": (3, 0, 5), "one": (0, 2, 0)}
TRAINED = {"updates": False, "everything": True}


def layers(ranks: tuple[int, ...], bias: bool, whole: bool) -> list[nn.Module]:
    """Projections of one input; ``ranks`` of their updates, 0 for none; ``whole`` trains the weights beside them."""
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for at, (out, rank) in enumerate(zip(OUT, ranks, strict=True)):
        linear = nn.Linear(WIDTH, out, bias=bias).requires_grad_(whole)
        layer = LoraLayer(linear, rank, 0.5 + at, 0.0) if rank else linear
        if isinstance(layer, LoraLayer):
            nn.init.normal_(layer.lora_B)
        found.append(layer)
    return found


def written_out(hidden: Tensor, layer: Any) -> Tensor:
    """W x + b + scale B A x in fp64."""
    base: Any = layer.base if isinstance(layer, LoraLayer) else layer
    output = F.linear(hidden.double(), base.weight.double(), None if base.bias is None else base.bias.double())
    if isinstance(layer, LoraLayer):
        output = output + layer.scale * hidden.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    return output


def trained(modules: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def probes(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, out, generator=generator).to(dtype) for out in OUT]


def total(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(output * probe).sum() for output, probe in zip(outputs, probes(), strict=True)]).sum()


@pytest.mark.parametrize("input_grad", [True, False], ids=["input", "no input"])
@pytest.mark.parametrize("whole", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_equals_the_formula(ranks: tuple[int, ...], bias: bool, whole: bool, input_grad: bool) -> None:
    modules = layers(ranks, bias, whole)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=input_grad)
    leaves = [*trained(modules), *([hidden] if input_grad else [])]
    found, expected = project(hidden, modules), [written_out(hidden, layer) for layer in modules]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    if not leaves:
        assert not any(output.requires_grad for output in found)
        return
    references = torch.autograd.grad(total(expected), leaves)
    total(found).backward()
    for leaf, reference in zip(leaves, references, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad, reference, rtol=1e-5, atol=1e-5)
    assert all(
        parameter.grad is None
        for module in modules
        for parameter in module.parameters()
        if parameter not in set(leaves)
    )


def test_frozen_layers_keep_no_activations() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    modules = layers(RANKS["plain"], bias=True, whole=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        project(hidden, modules)
    assert kept and not any(len(tensor) == TOKENS for tensor in kept)


@pytest.mark.parametrize("whole", TRAINED.values(), ids=TRAINED)
def test_autocast_sets_the_dtype_of_the_products_and_gradients_stay_wide(whole: bool) -> None:
    modules = layers(RANKS["some"], bias=True, whole=whole)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = project(hidden, modules)
    assert {output.dtype for output in found} == {torch.bfloat16}
    leaves = [*trained(modules), hidden]
    gradients = torch.autograd.grad(found, leaves, probes(torch.bfloat16))
    references = torch.autograd.grad(total([written_out(hidden, layer) for layer in modules]), leaves)
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.dtype == torch.float32
        assert float((gradient - reference).norm() / reference.norm()) < 1e-2


def test_narrow_layers_with_wide_updates() -> None:
    modules = [layer.to(torch.bfloat16) for layer in layers(RANKS["all"], bias=False, whole=False)]
    for layer in modules:
        assert isinstance(layer, LoraLayer)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    hidden = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    found = project(hidden, modules)
    leaves = [*trained(modules), hidden]
    gradients = torch.autograd.grad(found, leaves, probes(torch.bfloat16))
    references = torch.autograd.grad(total([written_out(hidden, layer) for layer in modules]), leaves)
    for leaf, gradient, reference in zip(leaves, gradients, references, strict=True):
        assert gradient.dtype == leaf.dtype
        assert float((gradient - reference).norm() / reference.norm()) < 1e-2


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1])
def test_few_tokens_in_bf16(tokens: int, bias: bool, wanted: bool) -> None:
    modules = [layer.to(torch.bfloat16) for layer in layers(RANKS["some"], bias=bias, whole=False)]
    hidden = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.set_grad_enabled(wanted):
        found = project(hidden, modules)
    for output, layer in zip(found, modules, strict=True):
        expected = written_out(hidden, layer)
        assert output.shape == expected.shape and output.dtype == torch.bfloat16
        assert float((output - expected).detach().norm() / expected.detach().norm()) < 1e-2


def test_one_output_alone_has_a_gradient() -> None:
    modules = layers(RANKS["all"], bias=True, whole=True)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    leaves = [*trained(modules[1:2]), hidden]
    gradients = torch.autograd.grad(project(hidden, modules)[1].square().sum(), leaves)
    references = torch.autograd.grad(written_out(hidden, modules[1]).square().sum(), leaves)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


class Opaque(nn.Linear):
    pass


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (nn.Linear(2, 2), True),
        (LoraLayer(nn.Linear(2, 2), 1, 1.0, 0.0), True),
        (LoraLayer(nn.Linear(2, 2), 1, 1.0, 0.5).eval(), True),
        (LoraLayer(nn.Linear(2, 2), 1, 1.0, 0.5).train(), False),
        (Opaque(2, 2), False),
        (LoraLayer(Opaque(2, 2), 1, 1.0, 0.0), False),
        (hooked(nn.Linear(2, 2)), False),
        (hooked(LoraLayer(nn.Linear(2, 2), 1, 1.0, 0.0)), False),
        (LoraLayer(hooked(nn.Linear(2, 2)), 1, 1.0, 0.0), False),
        (nn.Identity(), False),
    ],
    ids=[
        *("linear", "lora", "resting dropout", "dropout", "opaque", "lora of opaque"),
        *("hook", "hook on lora", "lora of hook", "other"),
    ],
)
def test_what_can_be_taken_apart(layer: nn.Module, plain: bool) -> None:
    assert (projection_of(layer) is not None) == plain
