"""The decoder with gradients written by hand, against transformers' own modules under autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny import random_rows, shake, tiny
from tunesmith.batch import NO_PARENT, Batch, Example, pack
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.methods.adapted import merge_layers
from tunesmith.models import decoder, forward, head, kernels
from tunesmith.models.decoder import Decoder, decoder_of
from tunesmith.models.projection import rounded_up
from tunesmith.objectives import Supervised
from tunesmith.train.precision import Precision

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
ROWS = random_rows((9, 17, 12, 30))
BATCH, PADDED = pack(ROWS), pack(ROWS, "padded")
CPU = torch.device("cpu")
MILD = {"initializer_range": 0.06}  # wider weights make narrow arithmetic chaotic

every_family = pytest.mark.parametrize("model_type", FAMILIES)


def varied(model_type: str = "llama", **overrides: Any) -> Any:
    """A model whose norms are not all ones and whose biases are not zero."""
    model = tiny(model_type, **overrides)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(model_type: str, method: Any, size: float = 0.5, **overrides: Any) -> Any:
    """A varied model with adapters away from zero; ``size`` scales them."""
    model = varied(model_type, **overrides)
    method.adapt(model)
    shake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.mul_(size)
    return model


def plain(model: Any) -> Any:
    """A copy of a model that runs through transformers' own modules, with cross-entropy of whole logits."""
    model = copy.deepcopy(model)
    decoder._DECODERS[model] = "off"
    head._PLAIN[model] = False
    return model


def gradients(model: Any, batch: Batch = BATCH, *, precision: Precision | None = None) -> dict[str, Tensor]:
    """In fp64 by name, the loss among them; a parameter that got none is left out."""
    model.zero_grad()
    with (precision or Precision()).arithmetic():
        loss = Supervised().loss(model, batch)["nll"]
    loss.backward()
    found = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    return {"loss": loss.detach().double()} | {name: grad.double() for name, grad in found.items() if grad is not None}


def reference(model: Any, batch: Batch = PADDED) -> dict[str, Tensor]:
    """In fp64, padded, so that nothing of the fast path has a part in it."""
    exact = plain(model).double()
    for module in exact.modules():  # weights in a dtype of their own have none now
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return gradients(exact, batch)


def error(found: dict[str, Tensor], exact: dict[str, Tensor], names: list[str] | None = None) -> float:
    """Relative, of all gradients as one vector."""
    assert found.keys() == exact.keys()
    chosen = names or [name for name in exact if name != "loss"]
    off = sum(float((found[name] - exact[name]).square().sum()) for name in chosen)
    return (off / sum(float(exact[name].square().sum()) for name in chosen)) ** 0.5


def assert_as_good_as_plain(model: Any, batch: Batch = BATCH, padded: Batch = PADDED) -> None:
    assert isinstance(decoder_of(model), Decoder)
    found, usual, exact = gradients(model, batch), gradients(plain(model), padded), reference(model, padded)
    for name in exact:
        assert error(found, exact, [name]) < max(2e-5, 1.5 * error(usual, exact, [name])), name


@every_family
@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_loss_and_gradients_are_those_of_transformers(model_type: str, method: Any) -> None:
    assert_as_good_as_plain(adapted(model_type, method))


@every_family
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bf16_is_as_exact_as_transformers_in_bf16(model_type: str, kind: str) -> None:
    if kind == "lora":
        model = adapted(model_type, Lora(rank=4), 0.2, dtype=torch.bfloat16, **MILD)
        precision = Precision(torch.bfloat16, CPU)
    else:
        model, precision = adapted(model_type, Full(), **MILD), Precision(torch.bfloat16, CPU, autocast=True)
    assert isinstance(decoder_of(model), Decoder)
    exact = reference(model)
    usual = gradients(plain(model), PADDED, precision=precision)
    assert error(gradients(model, precision=precision), exact) < 1.3 * error(usual, exact) < 0.05


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_models_without_a_decoder_train_under_autocast(model_type: str) -> None:
    """Their rotary positions leave queries and keys in fp32 there, and values in bf16."""
    model, precision = adapted(model_type, Full(), **MILD), Precision(torch.bfloat16, CPU, autocast=True)
    assert isinstance(decoder_of(model), str)
    exact = reference(model)
    usual = gradients(plain(model), PADDED, precision=precision)
    assert error(gradients(model, precision=precision), exact) < 1.3 * error(usual, exact) < 0.1


@every_family
def test_rows_do_not_change_each_other(model_type: str) -> None:
    model = varied(model_type)
    found = decoder_of(model)
    assert isinstance(found, Decoder)
    with forward._embeddings_kept(model) as embeddings:
        hidden = found.hidden_of_rows(BATCH.token_ids, BATCH.positions, BATCH.segments)
        (gradient,) = torch.autograd.grad(hidden[9:26].pow(3).sum(), embeddings)
    assert gradient[9:26].any(dim=1).all()
    assert not gradient[:9].any() and not gradient[26:].any()


@every_family
def test_hidden_states_do_not_depend_on_whether_gradients_are_wanted(model_type: str) -> None:
    model = adapted(model_type, Lora(rank=4))
    found = decoder_of(model)
    assert isinstance(found, Decoder)
    wanted = found.hidden_of_rows(BATCH.token_ids, BATCH.positions, BATCH.segments)
    with torch.no_grad():
        unwanted = found.hidden_of_rows(BATCH.token_ids, BATCH.positions, BATCH.segments)
    torch.testing.assert_close(wanted, unwanted, rtol=1e-5, atol=1e-5)
    assert wanted.requires_grad and not unwanted.requires_grad


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_children_share_their_parent(model_type: str) -> None:
    """A prompt with two answers gives what the two rows give that repeat the prompt."""
    prompt, one, other = (row.token_ids for row in random_rows([6, 4, 5]))
    rows = [
        Example(torch.cat([prompt, answer]), {"target_weights": (torch.arange(6 + len(answer)) > 6).float()})
        for answer in (one, other)
    ]
    shared = Batch(
        token_ids=torch.cat([prompt, one, other]),
        positions=torch.cat([torch.arange(10), torch.arange(6, 11)]),
        segments=torch.tensor([[0, 6, NO_PARENT], [6, 4, 0], [10, 5, 0]]),
        tensors={"target_weights": torch.tensor([0.0] * 7 + [1.0] * 3 + [0.0] + [1.0] * 4)},
        scopes={},
    )
    assert_as_good_as_plain(adapted(model_type, Full()), shared, pack(rows, "padded"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("shared", [False, True], ids=["rows", "children"])
def test_filling_up_changes_nothing(model_type: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(random_rows((9, 17, 12, 31)))
    if shared:
        batch = replace(batch, segments=torch.tensor([[0, 9, NO_PARENT], [9, 17, 0], [26, 12, 0], [38, 31, NO_PARENT]]))
    model = adapted(model_type, Full(), dtype=torch.bfloat16, **MILD)
    seen: list[int] = []
    monkeypatch.setattr(forward, "rounded_up", lambda count: seen.append(count) or rounded_up(count))
    precision = Precision(torch.bfloat16, CPU, autocast=True)
    filled = gradients(model, batch, precision=precision)
    monkeypatch.setattr(forward, "rounded_up", lambda count: count)
    monkeypatch.setattr(head, "rounded_up", lambda count: count)
    assert error(filled, gradients(model, batch, precision=precision)) < 1e-2
    assert seen == [69] and rounded_up(69) == 72


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of attention, in order, whether its query has a gradient."""
    calls: list[bool] = []
    attend = decoder.attend

    def counting(query: Tensor, *others: Any) -> Tensor:
        calls.append(query.requires_grad)
        return attend(query, *others)

    monkeypatch.setattr(decoder, "attend", counting)
    return calls


@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_recomputing_blocks_changes_nothing(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", method).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    calls = counted(monkeypatch)
    assert error(gradients(model), expected) < 1e-6
    assert len(calls) == 4  # two blocks, forward and again


def test_blocks_below_the_first_adapter_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", Lora(rank=4, targets=[r"layers\.1\.(self_attn|mlp)\..*_proj"]))
    assert isinstance(decoder_of(model), Decoder)  # checked now, so that the check's own calls are not counted
    calls = counted(monkeypatch)
    assert_as_good_as_plain(model)
    assert calls == [False, True]


def test_dropout_runs_the_layers_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", Lora(rank=4, dropout=0.5))
    calm = gradients(model)
    calls = counted(monkeypatch)
    torch.manual_seed(0)
    found = gradients(model.train())
    assert calls == [True, True]  # still the decoder
    assert found.keys() == calm.keys() and all(bool(grad.any()) for grad in found.values())
    assert found["loss"] != calm["loss"]
    model.eval()
    assert_as_good_as_plain(model)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_modules_trained_whole_in_a_bf16_model(tied: bool) -> None:
    saved = ["lm_head", "embed_tokens", "layers.0.input_layernorm", "model.norm"]
    method = Lora(rank=4, modules_to_save=saved)
    model = adapted("llama", method, 0.2, dtype=torch.bfloat16, tie_word_embeddings=tied, **MILD)
    assert isinstance(decoder_of(model), Decoder)
    exact = reference(model)
    found, usual = gradients(model), gradients(plain(model), PADDED)
    assert error(found, exact) < 1.3 * error(usual, exact) < 0.05
    assert any("norm" in name for name in found)


class Opaque(nn.Linear):
    """A layer whose weights say nothing about what it computes, as quantized ones."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_of_another_kind_are_called_as_they_are() -> None:
    model = varied()
    for block in model.model.layers:
        block.self_attn.k_proj.__class__ = block.mlp.up_proj.__class__ = Opaque
    assert_as_good_as_plain(model)
    Lora(rank=4).adapt(model)
    assert_as_good_as_plain(shake(model))


def test_modules_replaced_later_are_seen() -> None:
    """The base is looked at first, then adapted, then merged."""
    model = varied(tie_word_embeddings=False)
    decoder_of(model)
    Lora(rank=4, targets=["embed_tokens", "lm_head", "q_proj"]).adapt(model)
    assert_as_good_as_plain(shake(model))
    expected = gradients(model)["loss"]
    found, hidden = decoder_of(model), torch.randn(3, 32)
    assert isinstance(found, Decoder)
    torch.testing.assert_close(found.logits(hidden), model.lm_head(hidden))
    merge_layers(model)
    with torch.no_grad():
        merged = Supervised().loss(model, BATCH)["nll"]
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.logits(hidden), model.lm_head(hidden))


def hooked() -> Any:
    model: Any = tiny()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return model


def other_eps() -> Any:
    model: Any = tiny()
    model.model.norm.forward = lambda hidden: F.rms_norm(hidden, (32,), model.model.norm.weight, 10.0)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: tiny("gpt2"), "not laid out like Llama"),
        (lambda: tiny("gemma3_text"), "Gemma3DecoderLayer have no fused form"),
        (hooked, "hooks into its blocks"),
        (lambda: tiny(hidden_act="relu"), "its gate is relu"),
        (lambda: tiny(attention_dropout=0.1), "attention dropout"),
        (other_eps, "other hidden states"),
    ],
    ids=["gpt2", "gemma3", "hooks", "gate", "dropout", "difference"],
)
def test_models_without_a_decoder_say_why(build: Callable[[], Any], reason: str) -> None:
    assert reason in str(decoder_of(build()))


@pytest.mark.parametrize("name", ["rotate", "swiglu"])
def test_kernels_that_compute_something_else_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    def wrong(x: Tensor, *others: Any) -> Any:
        return right(x + 0.3, *others)

    monkeypatch.setattr(kernels, name, wrong)
    monkeypatch.setitem(decoder.GATES, "silu", decoder.GATES["silu"]._replace(forward=kernels.swiglu))
    assert "other hidden states" in str(decoder_of(tiny()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_looking_at_a_model_leaves_no_trace(training: bool, implementation: str) -> None:
    model = tiny().train(training)
    model.set_attn_implementation(implementation)
    state = torch.get_rng_state()
    assert decoder_of(model) is decoder_of(model)
    assert model.training == training and model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_gelu_by_tanh_and_its_gradient() -> None:
    gate, up, slope = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).mul(3).unbind()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    expected = F.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(kernels.geglu(gate, up), expected)
    found = kernels.geglu_backward(slope, gate, up)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (gate, up), slope), rtol=1e-5, atol=1e-5)
