"""Penalties for leaving the base: their values by hand, their gradients, and what cannot have them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import colour_rows, write_jsonl
from steps import assert_same, gradients, split
from tiny import random_rows, tiny
from tunesmith.base import InputError
from tunesmith.batch import Example, pack
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.methods.adapted import without_adapter
from tunesmith.methods.low_rank import lora_layers
from tunesmith.models.forward import next_token_logits
from tunesmith.models.head import divergences
from tunesmith.objectives import Supervised
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe import TrainSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.train import near_base
from tunesmith.train.near_base import REPLAYED, NearBase, refuse_other_heads, said_by_base

ROWS = random_rows((9, 17, 12, 30))


def moved(method: Any = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """An adapted model away from its start, and that start."""
    model = tiny()
    (method or Lora(rank=4)).adapt(model)
    start = {name: weight.detach().clone() for name, weight in trainable_parameters(model).items()}
    return model.train(), start


def shift(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainable_parameters(model).values():
            weight += torch.randn(weight.shape, generator=generator) * 0.1


def test_the_divergence_and_its_gradient_by_hand() -> None:
    torch.manual_seed(0)
    hidden, other, weight = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8), torch.randn(50, 8)
    expected = F.kl_div(
        F.log_softmax(hidden @ weight.T, -1), F.log_softmax(other @ weight.T, -1), log_target=True, reduction="none"
    ).sum(-1)
    found = divergences(hidden, other, weight)
    torch.testing.assert_close(found, expected)
    scale = torch.randn(7)
    (mine,) = torch.autograd.grad((found * scale).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * scale).sum(), hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert divergences(other, other, weight).abs().max() < 1e-6


def by_hand(model: nn.Module, rows: list[Example], kl: float) -> Tensor:
    """Cross-entropy and divergence from whole logits, in one graph."""
    batch = pack(rows)
    places = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    logits = F.log_softmax(next_token_logits(model, batch, places - 1), -1)
    with torch.no_grad(), without_adapter(model):
        base = F.log_softmax(next_token_logits(model, batch, places - 1), -1)
    nll = -logits.gather(1, batch.token_ids[places, None]).mean()
    return nll + kl * F.kl_div(logits, base, log_target=True, reduction="none").sum(-1).mean()


def test_cross_entropy_and_divergence_share_one_pass_and_equal_both_by_hand() -> None:
    model, _ = moved()
    objective = NearBase(Supervised(), model, TrainSpec(kl_to_base=0.7))
    shift(model)
    found, result = gradients(model, objective, [pack(ROWS)])
    model.zero_grad()
    expected = by_hand(model, ROWS, 0.7)
    expected.backward()
    wanted = {name: weight.grad for name, weight in trainable_parameters(model).items() if weight.grad is not None}
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same(found, wanted, 1e-4)


def test_without_divergence_it_is_the_objective_itself() -> None:
    model, _ = moved()
    objective = NearBase(Supervised(), model, TrainSpec(kl_to_base=0.7, l2_to_base=0.3))
    # At the start nothing has moved: both penalties and their gradients are zero.
    found, result = gradients(model, objective, [pack(ROWS)])
    expected, plain = gradients(model, Supervised(), [pack(ROWS)])
    assert result.loss == pytest.approx(plain.loss, rel=1e-5)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("average", ["tokens", "rows"])
def test_splitting_a_step_changes_nothing(method: Any, average: Any) -> None:
    model, _ = moved(method)
    kl = 0.0 if isinstance(method, Full) else 0.7
    objective = NearBase(Supervised(average=average), model, TrainSpec(kl_to_base=kl, l2_to_base=0.3))
    shift(model)
    expected, whole = gradients(model, objective, split(ROWS, [range(4)], "packed"))
    for layout, parts in (("packed", [[0], [1, 2], [3]]), ("padded", [range(4)]), ("padded", [[3, 0], [1, 2]])):
        found, result = gradients(model, objective, split(ROWS, parts, layout))
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert_same(found, expected, 1e-4)


def told(model: nn.Module, rows: list[Example]) -> list[Example]:
    """The rows with what the model says of them."""
    found = []
    for row in rows:
        said = said_by_base(model, pack([row]))
        found.append(
            replace(row, tensors={**row.tensors, **said}, scopes={**row.scopes, **dict.fromkeys(said, "target")})
        )
    return found


@pytest.mark.parametrize("kept", [3, 96])
def test_a_base_that_is_changed_has_spoken_before(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all tokens of the vocabulary it is the divergence itself; over some of them, one from below."""
    monkeypatch.setattr(near_base, "KEPT_TOKENS", kept)
    model, _ = moved(Full())
    rows, base = told(model, ROWS), copy.deepcopy(model)
    objective = NearBase(Supervised(), model, TrainSpec(kl_to_base=0.7))
    at_start = objective.loss(model, pack(rows))
    assert abs(at_start["kl_to_base"].item()) < 1e-4
    shift(model)
    batch = pack(ROWS)
    places = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    logits = F.log_softmax(next_token_logits(model, batch, places - 1), -1)
    with torch.no_grad():
        before = F.log_softmax(next_token_logits(base, batch, places - 1), -1)
    expected = F.kl_div(logits, before, log_target=True, reduction="none").sum(-1).mean()
    total = 0.7 * expected - logits.gather(1, batch.token_ids[places, None]).mean()
    total.backward()
    wanted = {name: weight.grad for name, weight in trainable_parameters(model).items() if weight.grad is not None}
    plain, without = gradients(model, Supervised(), [batch])
    found, result = gradients(model, objective, [pack(rows)])
    if kept < 96:
        assert without.loss < result.loss < total.item()
        return
    assert result.loss == pytest.approx(total.item(), rel=1e-5)
    assert_same(found, wanted, 1e-4)
    assert any(not torch.allclose(found[name], plain[name]) for name in plain)
    parts, _ = gradients(model, objective, split(rows, [[0], [1, 2], [3]], "padded"))
    assert_same(parts, found, 1e-4)


def test_l2_is_half_the_squared_distance_from_the_start() -> None:
    model, start = moved(Full())
    objective = NearBase(Supervised(), model, TrainSpec(l2_to_base=0.3))
    shift(model)
    loss = objective.loss(model, pack(ROWS))["l2_to_base"]
    own = trainable_parameters(model)
    expected = 0.15 * torch.stack([(own[name] - before).square().sum() for name, before in start.items()]).sum()
    assert loss.item() == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, own["model.norm.weight"])
    torch.testing.assert_close(gradient, 0.3 * (own["model.norm.weight"] - start["model.norm.weight"]).detach())


def test_l2_of_lora_is_the_norm_of_its_updates() -> None:
    model, _ = moved()
    objective = NearBase(Supervised(), model, TrainSpec(l2_to_base=0.3))
    shift(model)
    expected = 0.15 * sum(float(layer.delta().square().sum()) for layer in lora_layers(model).values())
    assert objective.loss(model, pack(ROWS))["l2_to_base"].item() == pytest.approx(expected, rel=1e-4)


def test_divergence_on_replayed_rows_alone() -> None:
    marks = [0.0, 1.0, 0.0, 1.0]
    rows = [
        Example(
            row.token_ids,
            {**row.tensors, REPLAYED: torch.full((row.targets,), mark)},
            {**row.scopes, REPLAYED: "target"},
        )
        for row, mark in zip(ROWS, marks, strict=True)
    ]
    model, _ = moved()
    everywhere = NearBase(Supervised(), model, TrainSpec(kl_to_base=1.0))
    replayed = NearBase(Supervised(), model, TrainSpec(kl_to_base=1.0, kl_on="replay"))
    shift(model)
    both = pack([rows[1], rows[3]])
    expected = everywhere.loss(model, both)["kl_to_base"] / everywhere.weights(both)["kl_to_base"]
    found = replayed.loss(model, pack(rows))["kl_to_base"] / replayed.weights(pack(rows))["kl_to_base"]
    torch.testing.assert_close(found, expected)
    none = pack([rows[0], rows[2]])
    assert float(replayed.loss(model, none)["kl_to_base"]) == 0 == float(replayed.weights(none)["kl_to_base"])
    # A step of which only some micro-batches hold replayed rows.
    whole, _ = gradients(model, replayed, [pack(rows)])
    parts, _ = gradients(model, replayed, split(rows, [[0, 2], [1], [3]], "packed"))
    assert_same(parts, whole, 1e-4)


# --- in recipes ---


def recipe(model: Path, rows: Path, output: Path, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(rows), "test": 0.2},
        "train": {"steps": 8, "batch_size": 8, "learning_rate": 0.05, "dtype": "fp32", "checkpoint_every": 2},
        "evaluate": {"max_new_tokens": 4, "resamples": 20, "rows": 8, "forgetting": "off"},
        "output": str(output),
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    return check_recipe(values, "test")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_penalties_hold_a_run_back_and_it_resumes_to_the_same_bytes(
    method: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    import os
    import signal

    from safetensors.torch import load_file

    from tunesmith.base import Interrupted
    from tunesmith.pipeline.finetune import Watcher

    def once(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    penalty = {"kl_to_base": 5.0, "l2_to_base": 0.1, **({"learning_rate": 0.005} if method == "full" else {})}
    free = finetune(recipe(tiny_model, rows_file, tmp_path / "free", method=method))
    held = finetune(recipe(tiny_model, rows_file, tmp_path / "held", method=method, train=penalty))
    asked = recipe(tiny_model, rows_file, tmp_path / "again", method=method, train=penalty)
    with pytest.raises(Interrupted):
        finetune(asked, watcher=Watcher(event=once))
    again = finetune(asked, resume=True)
    assert held.result is not None and again.result is not None and free.result is not None
    for path in held.result.glob("*.safetensors"):
        assert path.read_bytes() == (again.result / path.name).read_bytes()
        if method == "lora":
            sizes = [
                sum(float(t.square().sum()) for name, t in load_file(run / path.name).items() if "lora_B" in name)
                for run in (free.result, held.result)
            ]
            assert sizes[1] < sizes[0]


CANNOT: list[tuple[dict[str, Any], str, str]] = [
    (
        {
            "method": {"kind": "lora", "modules_to_save": ["norm"]},
            "train": {"kl_to_base": 1},
            "budget": {"memory": "2GB"},
        },
        "train.kl_to_base",
        "the whole model must be in memory",
    ),
    ({"train": {"kl_on": "replay"}}, "train.kl_on", "no penalty"),
    ({"train": {"kl_on": "replay", "kl_to_base": 1}}, "train.kl_on", "no rows are replayed"),
    ({"train": {"shard": True, "l2_to_base": 1}}, "train.l2_to_base", "spread over processes"),
    (
        {"method": {"kind": "lora", "targets": ["lm_head"]}, "train": {"kl_to_base": 1}},
        "train.kl_to_base",
        "trained itself",
    ),
    ({"method": "qlora-loftq", "train": {"l2_to_base": 1}}, "train.l2_to_base", "does not start at the base"),
]


@pytest.mark.parametrize(("sections", "where", "said"), CANNOT)
def test_what_cannot_be_is_refused(
    sections: dict[str, Any], where: str, said: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    if sections.get("method") == "qlora-loftq":
        sections = {**sections, "method": {"kind": "qlora", "init": "loftq"}}
    with pytest.raises(InputError, match=said) as error:
        finetune(recipe(tiny_model, rows_file, tmp_path / "run", **sections))
    assert error.value.where == where


def test_an_output_layer_that_is_no_single_product_is_refused() -> None:
    model = tiny("gemma2", final_logit_softcapping=5.0)
    Lora(rank=2).adapt(model)
    with pytest.raises(InputError, match="more than one product"):
        refuse_other_heads(model)


def test_penalty_on_what_is_replayed_in_a_run(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", colour_rows(20, start=400))
    data = {"replay": {"path": str(general), "share": 0.3}}
    losses = []
    for kl in (0.0, 3.0):
        train = {"kl_to_base": kl, "kl_on": "replay"} if kl else {}
        run = finetune(recipe(tiny_model, rows_file, tmp_path / f"run-{kl}", data=data, train=train))
        losses.append([event["loss"] for event in run.events() if event["event"] == "step"])
    assert losses[0][0] == pytest.approx(losses[1][0]) and losses[0][3:] != losses[1][3:]


def test_a_frozen_trunk_reads_only_the_rows_that_the_steps_come_to(tiny_model: Path, tmp_path: Path) -> None:
    from tunesmith.pipeline.features import with_features
    from tunesmith.pipeline.loaded import load
    from tunesmith.pipeline.planning import plan_job

    rows = write_jsonl(tmp_path / "rows.jsonl", colour_rows(60))
    job = recipe(tiny_model, rows, tmp_path / "run", method={"kind": "head"}, train={"steps": 3, "batch_size": 2})
    planned, said = plan_job(job), set()
    model = load(str(tiny_model), dtype="fp32")
    found = with_features(planned, model, lambda label, done, total: said.add(total)).prepared
    assert found is not None and 6 in said
    visited = found.order.rows(0, 6)
    assert all("features" in found.train[at].example.tensors for at in visited)
    with pytest.raises(IndexError, match="do not come to it"):
        found.train[next(at for at in range(len(found.train)) if at not in visited)]
