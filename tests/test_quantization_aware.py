"""LoRA through simulated 4 bits: the formula under autograd, the merged and rounded model, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import random_rows, shake, tiny
from tunesmith.base import InputError
from tunesmith.batch import pack
from tunesmith.methods import Lora
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.low_rank import LoraLayer, lora_layers
from tunesmith.models.decoder import Decoder, decoder_of
from tunesmith.models.forward import next_token_logits
from tunesmith.models.projection import project
from tunesmith.models.quantization_grid import Grid
from tunesmith.objectives import Supervised
from tunesmith.recipe_file import check_recipe

NAMES: Any = ("q4_0", "q4_1", "nf4")
every_grid = pytest.mark.parametrize("name", NAMES)
BATCH = pack(random_rows((9, 17, 30)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return next_token_logits(model.eval(), BATCH, torch.arange(BATCH.tokens)).float()


def straight_through(x: Tensor, layer: LoraLayer) -> Tensor:
    """x Q(W + scale B A)^T + b, where autograd sees Q(V) as V."""
    assert layer.grid is not None
    merged = layer.weight + layer.scale * layer.lora_B @ layer.lora_A
    return F.linear(x, merged + (layer.grid.rounded(merged) - merged).detach(), layer.bias)


@pytest.mark.parametrize("few", [True, False], ids=["one layer", "several"])
@every_grid
def test_values_and_gradients_are_those_of_the_formula(name: Any, few: bool) -> None:
    torch.manual_seed(0)
    layers = []
    for out in (24,) if few else (24, 16, 40):
        layer = LoraLayer(nn.Linear(64, out).requires_grad_(False), 4, 0.5, 0.0)
        nn.init.normal_(layer.lora_B, std=0.2)
        layer.grid = Grid(name)
        layers.append(layer)
    plain = nn.Linear(64, 8).requires_grad_(False)
    x = torch.randn(13, 64)
    results = []
    for run in (
        lambda given: project(given, [*layers, plain]),
        lambda given: [straight_through(given, la) for la in layers],
    ):
        given = x.clone().requires_grad_()
        outputs = run(given)[: len(layers)]
        total = torch.stack([(output * output.detach().cos()).sum() for output in outputs]).sum()
        parameters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
        results.append([*outputs, *torch.autograd.grad(total, [given, *parameters])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@every_grid
def test_the_model_that_is_trained_is_the_one_that_is_merged_and_rounded(name: Any, model_type: str) -> None:
    model = tiny(model_type, hidden_size=64, intermediate_size=64)
    base = copy.deepcopy(model)
    notes = Lora(rank=4, quantization_aware=name).adapt(model)
    assert notes == []
    shake(model)
    trained = logits(model)
    with without_adapter(model):
        assert torch.allclose(logits(model), logits(base), atol=1e-5)
    adapted = list(lora_layers(model))
    merge_layers(model)
    assert not torch.allclose(logits(model), trained, atol=1e-2)
    with torch.no_grad():
        for layer in map(model.get_submodule, adapted):
            weight: Any = layer.weight
            turned = type(layer) is not nn.Linear
            rounded = Grid(name).rounded(weight.t() if turned else weight)
            weight.copy_(rounded.t() if turned else rounded)
    assert torch.allclose(logits(model), trained, atol=1e-4)


def test_the_fused_blocks_round_as_the_layers_do() -> None:
    model = tiny(hidden_size=64, intermediate_size=64)
    Lora(rank=4, quantization_aware="q4_1").adapt(model)
    shake(model)
    assert isinstance(decoder_of(model), Decoder)

    def gradient() -> Tensor:
        model.train().zero_grad()
        Supervised().loss(model, BATCH)["nll"].backward()
        return torch.cat(
            [la.lora_A.grad.reshape(-1) for la in lora_layers(model).values() if la.lora_A.grad is not None]
        )

    fused = gradient()
    for layer in lora_layers(model).values():
        layer.forward = lambda given, layer=layer: straight_through(given, layer)  # type: ignore[method-assign]
        layer.low_rank = lambda: None  # type: ignore[method-assign]
    assert torch.allclose(gradient(), fused, rtol=1e-3, atol=1e-3 * float(fused.abs().max()))


def test_what_stays_unrounded_is_said() -> None:
    notes = Lora(rank=2, quantization_aware="q4_0", targets="attention").adapt(tiny())
    assert len(notes) == 1 and "6 linear layers" in notes[0] and "get no adapter" in notes[0]
    notes = Lora(rank=2, quantization_aware="q4_0").adapt(tiny(intermediate_size=48))
    assert len(notes) == 1 and "2 linear layers (first: model.layers.0.mlp.down_proj)" in notes[0]
    assert "blocks of 32" in notes[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dora": True}, "dora computes something else"),
        ({"init": "gaussian"}, "init computes something else"),
        ({"dropout": 0.1}, "dropout computes something else"),
        ({"targets": ["embed_tokens"]}, "linear layers only"),
        ({"init": "loftq"}, "the base is not quantized"),
    ],
)
def test_what_cannot_be_rounded_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Lora(quantization_aware="q4_0", **settings).adapt(tiny())


def test_a_hook_is_not_passed_over() -> None:
    model: Any = tiny()
    Lora(quantization_aware="q4_0").adapt(model)
    model.model.layers[0].self_attn.q_proj.base.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="cannot be rounded"):
        logits(model)


@pytest.mark.parametrize(("written", "meant"), [(True, "q4_0"), (False, "none"), ("nf4", "nf4")])
def test_true_and_false_have_a_meaning(written: Any, meant: str) -> None:
    recipe = {"model": "m", "data": {"train": "t"}, "method": {"kind": "lora", "quantization_aware": written}}
    method = check_recipe(recipe, "test").method
    assert isinstance(method, Lora) and method.quantization_aware == meant
