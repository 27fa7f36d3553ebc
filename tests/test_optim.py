"""Schedules and optimizers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn
from transformers import get_scheduler

from trial import adapted, plan_of
from tunesmith.base import InputError
from tunesmith.methods import Full
from tunesmith.recipe import GroupSpec, TrainSpec
from tunesmith.train.optim import build_optimizer, learning_rate_at, own_rates_at, set_learning_rate

SCHEDULES = ("constant", "linear", "cosine", "wsd")


def rates(schedule: Any, steps: int, warmup: int, peak: float = 1.0) -> list[float]:
    plan = plan_of(steps=steps, warmup_steps=warmup, learning_rate=peak)
    return [learning_rate_at(at, TrainSpec(schedule=schedule), plan) for at in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    assert rates(schedule, 20, 4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(schedule, 20, 0)[0] == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_equal_those_of_transformers_after_warmup(schedule: str) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(schedule, 40, 5, peak=0.3)[5:] == pytest.approx(expected[5:])


def test_warmup_stable_decay_holds_and_then_falls() -> None:
    found = rates("wsd", 50, 0)
    assert found[:41] == pytest.approx([1.0] * 41)
    assert found[40:] == pytest.approx([1 - at / 10 for at in range(10)])


@given(some.sampled_from(SCHEDULES), some.integers(1, 200), some.integers(0, 250), some.floats(1e-7, 10))
def test_rates_stay_within_zero_and_the_peak(schedule: str, steps: int, warmup: int, peak: float) -> None:
    found = rates(schedule, steps, warmup, peak)
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in found)
    after = found[warmup:]
    assert after == sorted(after, reverse=True)
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert schedule == "constant" or not after or after[-1] <= peak


def test_vectors_are_not_decayed() -> None:
    model = adapted(Full(), tie_word_embeddings=True)
    groups = build_optimizer(model, TrainSpec(weight_decay=0.3), 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.dim() >= 2 for parameter in groups[0]["params"])
    assert all(parameter.dim() < 2 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    lora = build_optimizer(adapted(), TrainSpec(weight_decay=0.3), 1e-3)
    assert [group["weight_decay"] for group in lora.param_groups] == [0.3]


def test_a_group_may_have_a_schedule_of_its_own() -> None:
    model = adapted()
    spec = TrainSpec(schedule="cosine", groups=[GroupSpec(match="lora_B", rate=2.0, schedule="linear")])
    plan = plan_of(steps=40, warmup_steps=5, learning_rate=0.3)
    optimizer = build_optimizer(model, spec, 0.3)
    assert len(optimizer.param_groups) == 2
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for at in range(1, 41):
        set_learning_rate(optimizer, learning_rate_at(at, spec, plan), own_rates_at(at, spec, plan))
        for group in optimizer.param_groups:
            own = "lora_B" in names[id(group["params"][0])]
            expected = TrainSpec(schedule="linear" if own else "cosine")
            assert group["lr"] == (1 + own) * learning_rate_at(at, expected, plan)


def test_only_trainable_weights_are_optimized() -> None:
    model = adapted()
    optimizer = build_optimizer(model, TrainSpec(), 1e-3)
    chosen = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert chosen == {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}


def test_adamw_is_adamw() -> None:
    """Against Loshchilov & Hutter 2019, algorithm 2, in fp64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = build_optimizer(model, TrainSpec(weight_decay=0.1), 0.01)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for at in range(1, 6):
        rate = 0.01 / at
        set_learning_rate(optimizer, rate)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            mean, variance = first[name] / (1 - 0.9**at), second[name] / (1 - 0.999**at)
            decay = 0.1 if parameter.dim() == 2 else 0.0
            expected[name] = expected[name] * (1 - rate * decay) - rate * mean / (variance.sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_adamw_with_8_bit_states_stays_close_to_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    moved = {}
    for kind in ("adamw", "adamw-8bit"):
        torch.manual_seed(0)
        model = nn.Linear(64, 128, bias=False)  # bitsandbytes keeps smaller ones in 32 bits
        start = model.weight.detach().clone()
        optimizer = build_optimizer(model, TrainSpec(optimizer=kind, weight_decay=0.1), 1e-2)  # pyright: ignore[reportArgumentType]
        for at in range(5):
            set_learning_rate(optimizer, 1e-2 / (at + 1))
            model.weight.grad = torch.randn(model.weight.shape)
            optimizer.step()
        moved[kind] = (model.weight.detach() - start).flatten()
    states = [value for state in optimizer.state_dict()["state"].values() for value in nested(state)]
    assert any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in states)
    assert torch.cosine_similarity(moved["adamw"], moved["adamw-8bit"], dim=0) > 0.99
    assert not torch.equal(moved["adamw"], moved["adamw-8bit"])


def nested(value: Any) -> list[Any]:
    return [leaf for inner in value.values() for leaf in nested(inner)] if isinstance(value, dict) else [value]


def test_8_bit_states_without_bitsandbytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="adamw-8bit needs bitsandbytes"):
        build_optimizer(adapted(), TrainSpec(optimizer="adamw-8bit"), 1e-3)
