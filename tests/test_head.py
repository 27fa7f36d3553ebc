"""Log-probabilities straight from hidden states, and for which models they are those of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny import random_rows, reference_logits, tiny
from tunesmith.batch import pack
from tunesmith.models import head
from tunesmith.models.forward import next_token_logps
from tunesmith.models.head import has_plain_head, target_logps

ROWS, WIDTH, VOCABULARY = 13, 8, 20


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, targets, and what the loss is multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(count, WIDTH, generator=generator) for count in (ROWS, VOCABULARY))
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, targets, torch.randn(ROWS, generator=generator)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def exactly(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(
    params=[(2**24, 2**20), (3 * VOCABULARY, VOCABULARY), (5 * VOCABULARY, 2 * VOCABULARY), (1, 1)], ids=str
)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many logits exist, and are looked at in fp32, at a time."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", request.param[0])
    monkeypatch.setattr(head, "WIDE_AT_ONCE", request.param[1])


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("wanted", ["hidden", "weight", "both"])
def test_equals_cross_entropy_in_fp64(wanted: str) -> None:
    hidden, weight, targets, slope = made()
    leaves = {"hidden": [hidden], "weight": [weight], "both": [hidden, weight]}[wanted]
    for leaf in leaves:
        leaf.requires_grad_()
    found, expected = target_logps(hidden, weight, targets), exactly(hidden, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((found * slope).sum(), leaves)
    for gradient, reference in zip(gradients, torch.autograd.grad((expected * slope).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_without_gradients_and_without_rows() -> None:
    hidden, weight, targets, _ = made()
    with torch.no_grad():
        expected = exactly(hidden, weight, targets)
        torch.testing.assert_close(target_logps(hidden, weight, targets).double(), expected, rtol=1e-5, atol=1e-5)
    assert target_logps(hidden[:0].requires_grad_(), weight, targets[:0]).shape == (0,)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("way", ["bf16", "autocast"])
def test_bf16_is_as_exact_as_cross_entropy_in_bf16(way: str, trained: bool) -> None:
    hidden, weight, targets, slope = made()
    if way == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]

    def results(compute: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast" and compute is not exactly):
            logps = compute(hidden, weight, targets)
        return [logps.detach(), *torch.autograd.grad((logps * slope).sum(), leaves)]

    exact = results(exactly)
    for found, usual, reference in zip(results(target_logps), results(cross_entropy), exact, strict=True):
        assert found.dtype == usual.dtype
        assert relative(found, reference) < 1.5 * relative(usual, reference) < 0.05


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_sure_token_keeps_its_small_gradient(trained: bool) -> None:
    """At a probability of 0.999 the slope of the target is 0.001: one less a share in bf16 would be 0 or 0.004."""
    weight = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = (weight[:ROWS].float() / weight[:ROWS].float().norm(dim=1, keepdim=True) ** 2 * 20).bfloat16()
    logits = hidden.double() @ weight.double().T
    targets = logits.argmax(1)
    margin = logits.topk(2).values
    hidden = (hidden.double() * (torch.log(torch.tensor(999.0 * 3)) / (margin[:, :1] - margin[:, 1:]))).bfloat16()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    expected = exactly(hidden, weight, targets)
    assert bool((expected.exp() > 0.99).all()) and 0.998 < float(expected.detach().exp().median()) < 0.99999
    (exact,) = torch.autograd.grad(expected.sum(), hidden)
    (usual,) = torch.autograd.grad(cross_entropy(hidden, weight, targets).sum(), hidden)
    (found,) = torch.autograd.grad(target_logps(hidden, weight, targets).sum(), hidden)
    assert relative(found, exact) < 1.05 * relative(usual, exact)


MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "gpt2": ("gpt2", {}, True),
    "qwen2": ("qwen2", {}, True),
    "gemma2": ("gemma2", {}, False),
    "gemma2, small logits": ("gemma2", {"initializer_range": 0.02}, False),
    "granite": ("granite", {"logits_scaling": 8.0}, False),
    "cohere": ("cohere", {}, False),
}


@pytest.mark.parametrize(("model_type", "overrides", "plain"), MODELS.values(), ids=MODELS)
def test_heads_that_scale_or_cap_are_left_to_their_model(
    model_type: str, overrides: dict[str, Any], plain: bool
) -> None:
    model = tiny(model_type, **overrides)
    assert has_plain_head(model) == plain
    rows = random_rows((9, 12))
    logits = torch.cat([reference_logits(model, row.token_ids) for row in rows])
    positions = torch.tensor([0, 3, 7, 9, 19])
    layouts: list[Any] = ["padded"] if model_type == "gemma2" else ["packed", "padded"]  # its attention cannot pack
    for batch in (pack(rows, layout) for layout in layouts):
        targets = batch.token_ids[positions + 1]
        with torch.no_grad():
            found = next_token_logps(model, batch, positions, targets)
        expected = -F.cross_entropy(logits[positions], targets, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_looking_at_a_head_leaves_no_trace(dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype).train()
    model.set_attn_implementation("eager")
    assert has_plain_head(model)
    assert model.training and model.config._attn_implementation == "eager"
