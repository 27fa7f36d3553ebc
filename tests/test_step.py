"""One optimizer step: however its rows are laid out, split or spread, the gradient is the same."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

import two_processes
from steps import assert_same, gradients, split
from tiny import random_rows, reference_logits, shake, tiny
from tunesmith.batch import Batch, Example, pack
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.objectives import Supervised, TargetLogps, TrainingObjective
from tunesmith.objectives.logps import token_logps
from tunesmith.recipe import TrainSpec
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer
from tunesmith.train.precision import Precision

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS: dict[str, Any] = {
    "full": Full(),
    "lora": Lora(rank=4),
    "embedding": Lora(rank=4, targets=["embed_tokens", "lm_head", "v_proj"]),
    "whole": Lora(rank=4, targets="qv", modules_to_save=["embed_tokens"]),
}

OBJECTIVES: dict[str, TrainingObjective] = {"sft": Supervised()}

ROWS = random_rows([9, 4, 14, 6, 3, 11, 1], weights=(0.0, 0.5, 1.0, 2.0))  # the last row has nothing to learn

SPLITS = {
    "one": [[0, 1, 2, 3, 4, 5, 6]],
    "each": [[0], [1], [2], [3], [4], [5], [6]],
    "ragged": [[6], [4, 0, 2], [1], [5, 3]],
}

conformance = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def adapted(method: Any, **overrides: Any) -> nn.Module:
    model = tiny(**{"tie_word_embeddings": True, **overrides})
    method.adapt(model)
    return shake(model)


@every_method
@conformance
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("parts", ["each", "ragged"])
def test_splitting_rows_changes_nothing(method: Any, objective: TrainingObjective, layout: Any, parts: str) -> None:
    model = adapted(method)
    whole, expected = gradients(model, objective, split(ROWS, SPLITS["one"], layout))
    some, found = gradients(model, objective, split(ROWS, SPLITS[parts], layout))
    assert_same(some, whole)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert (found.tokens, found.targets) == (expected.tokens, expected.targets) == (48, sum(r.targets for r in ROWS))


@every_method
@conformance
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_packing_changes_nothing(method: Any, objective: TrainingObjective, model_type: str) -> None:
    model = tiny(model_type, tie_word_embeddings=True)
    method.adapt(model)
    shake(model)
    padded, expected = gradients(model, objective, split(ROWS, SPLITS["ragged"], "padded"))
    packed, found = gradients(model, objective, split(ROWS, SPLITS["ragged"], "packed"))
    assert_same(packed, padded, 3e-5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@every_method
@conformance
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_recomputing_activations_changes_nothing(method: Any, objective: TrainingObjective, layout: Any) -> None:
    model: Any = adapted(method)
    batches = split(ROWS, SPLITS["ragged"], layout)
    expected, _ = gradients(model.train(), objective, batches)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    entered = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: entered.append(1))
    found, _ = gradients(model, objective, batches)
    assert len(entered) == 2 * len(batches)
    assert_same(found, expected, 3e-5)  # a hooked block runs as its library wrote it: another order of additions


@every_method
def test_sft_is_the_weighted_mean_of_the_negative_log_likelihood(method: Any) -> None:
    model = adapted(method)
    _, found = gradients(model, Supervised(), split(ROWS, SPLITS["ragged"], "packed"))
    total = count = 0.0
    for row in ROWS:
        weights = row.tensors["target_weights"]
        logps = torch.log_softmax(reference_logits(model, row.token_ids).double(), -1)
        for at in range(1, len(row)):
            total -= float(weights[at] * logps[at - 1, row.token_ids[at]])
            count += float(weights[at])
    assert found.loss == pytest.approx(total / count, rel=1e-5)


def test_log_probabilities_come_with_their_positions() -> None:
    model, batch = tiny(), pack(ROWS)
    with torch.no_grad():
        logps, chosen = token_logps(model, batch)
    assert chosen.tolist() == [at for at, weight in enumerate(batch.tensors["target_weights"].tolist()) if weight > 0]
    assert logps.dtype == torch.float32 and bool((logps < 0).all())


class Two(TrainingObjective):
    """A sum over tokens and a sum over rows, each with its own divisor."""

    terms: ClassVar[tuple[str, ...]] = ("tokens", "rows")
    windows: ClassVar[list[int]] = []

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        self.windows.append(len(window))
        return window

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        return token_logps(model, batch)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "tokens": batch.tensors["target_weights"].double().sum(),
            "rows": torch.tensor(float(batch.rows), dtype=torch.float64),
        }

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logps, chosen = token_logps(model, batch)
        row = torch.searchsorted(batch.segments[:, 0].contiguous(), chosen, right=True) - 1
        rows = torch.zeros(batch.rows).index_add(0, row, logps)
        return {"tokens": -logps.sum(), "rows": rows.square().sum()}


def test_each_term_has_its_own_divisor() -> None:
    model = adapted(METHODS["lora"])
    whole, expected = gradients(model, Two(), split(ROWS, SPLITS["one"], "packed"))
    some, found = gradients(model, Two(), split(ROWS, SPLITS["ragged"], "packed"))
    assert_same(some, whole)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert Two.windows == [1, 4]
    with torch.no_grad():
        sums = Two().loss(model, pack(ROWS))
    targets = sum(float(row.tensors["target_weights"].sum()) for row in ROWS)
    assert expected.loss == pytest.approx(float(sums["tokens"]) / targets + float(sums["rows"]) / 7, rel=1e-6)


@pytest.mark.parametrize("parts", SPLITS)
def test_clipping_bounds_the_whole_gradient(parts: str) -> None:
    model = adapted(METHODS["lora"])
    free, unclipped = gradients(model, Supervised(), split(ROWS, SPLITS[parts], "packed"))
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in free.values()))
    assert unclipped.grad_norm == pytest.approx(norm, rel=1e-5)
    clipped, found = gradients(model, Supervised(), split(ROWS, SPLITS[parts], "packed"), clip=norm / 4)
    assert found.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_same(clipped, {name: tensor / 4 for name, tensor in free.items()})
    loose, _ = gradients(model, Supervised(), split(ROWS, SPLITS[parts], "packed"), clip=norm * 4)
    assert_same(loose, free)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_gradient_that_is_no_number_moves_nothing(where: str, dtype: torch.dtype) -> None:
    model = adapted(METHODS["lora"])
    optimizer = build_optimizer(model, TrainSpec(), 1e-2)
    precision = Precision(dtype)
    good = split(ROWS, SPLITS["ragged"], "packed")
    for _ in range(2):
        assert step(model, Supervised(), optimizer, good, precision=precision).applied
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    scale = precision.scaler.get_scale()
    if where == "loss":
        bad = pack(
            [
                Example(
                    ROWS[0].token_ids,
                    {"target_weights": torch.full((9,), math.inf).index_fill(0, torch.tensor([0]), 0)},
                )
            ]
        )
        result = step(model, Supervised(), optimizer, [*good, bad], precision=precision)
    else:
        parameter = next(iter(trainable_parameters(model).values()))
        handle = parameter.register_hook(lambda gradient: gradient * math.inf)
        result = step(model, Supervised(), optimizer, good, precision=precision)
        handle.remove()
        assert math.isfinite(result.loss)
    assert not result.applied
    assert all(torch.equal(before[0][name], tensor) for name, tensor in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(before[1][index][name], value) for name, value in state.items())
    if dtype == torch.float16:
        assert precision.scaler.get_scale() == scale / 2
    assert step(model, Supervised(), optimizer, good, precision=precision).applied
    assert not all(torch.equal(before[0][name], tensor) for name, tensor in model.state_dict().items())


def test_loss_scaling_leaves_the_gradient_as_it_is() -> None:
    model = adapted(METHODS["lora"])
    batches = split(ROWS, SPLITS["ragged"], "packed")
    expected, plain = gradients(model, Supervised(), batches)
    precision = Precision(torch.float16)
    found, scaled = gradients(model, Supervised(), batches, precision=precision)
    assert_same(found, expected)
    assert (scaled.loss, scaled.grad_norm) == pytest.approx((plain.loss, plain.grad_norm), rel=1e-5)
    # A process without rows must be able to take part in the step.
    assert Precision(torch.float16).state()["scale"] == precision.state()["scale"]
    empty = Precision(torch.float16)
    optimizer = SGD(trainable_parameters(model).values(), lr=0.0)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    empty.unscale(optimizer)
    empty.update(optimizer)


@pytest.mark.parametrize("method", ["full", "whole"])
def test_arithmetic_in_bf16_keeps_weights_and_gradients_in_fp32(method: str) -> None:
    model = adapted(METHODS[method])
    batches = split(ROWS, SPLITS["ragged"], "packed")
    expected, plain = gradients(model, Supervised(), batches)
    precision = Precision(torch.bfloat16, autocast=True)
    found, rounded = gradients(model, Supervised(), batches, precision=precision)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert rounded.loss == pytest.approx(plain.loss, rel=2e-2) and rounded.loss != plain.loss
    for name, tensor in expected.items():
        assert F.cosine_similarity(found[name].flatten(), tensor.flatten(), dim=0) > 0.97, name


def test_the_loss_falls() -> None:
    for method in METHODS.values():
        model = adapted(method)
        optimizer = build_optimizer(model, TrainSpec(), 1e-2)
        batches = split(ROWS, SPLITS["ragged"], "packed")
        losses = [step(model, Supervised(), optimizer, batches).loss for _ in range(8)]
        assert losses[-1] < 0.7 * losses[0]


def run_by_two_processes(directory: Path) -> None:
    script = Path(two_processes.__file__)
    paths = [str(script.parents[1] / "src"), str(script.parent)]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(directory), "--stop"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """One test, because starting processes is slow: steps of every method in both layouts, and how a run stops."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    run_by_two_processes(together)
    two_processes.main(alone)
    ways = [f"{method}-{packed}" for method in two_processes.METHODS for packed in (True, False)]
    for name in (f"{way}{name}" for name in ways for way in ("", "sharded-")):
        first, second = (load_file(together / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert_same(first, load_file(alone / f"{name}-0.safetensors"))
        results, reference = (json.loads((at / f"{name}-0.json").read_text()) for at in (together, alone))
        assert results == json.loads((together / f"{name}-1.json").read_text())
        assert [result["applied"] for result in results[:2]] == [True, True]
        for one, other in zip(results, reference, strict=True):
            assert one == pytest.approx(other, rel=1e-5), name
    # Objectives that measure something over a whole step before it: KTO's baseline, and the advantages of answers.
    for name in ("kto", *two_processes.POLICIES):
        first, second = (load_file(together / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert_same(first, load_file(alone / f"{name}-0.safetensors"))
        results, reference = (json.loads((at / f"{name}-0.json").read_text()) for at in (together, alone))
        assert len(results) == len(reference) == (2 if name == "kto" else 5)
        for one, other in zip(results, reference, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6), name
    stopped = [json.loads((together / f"stop-{rank}.json").read_text()) for rank in (0, 1)]
    assert stopped[0] == stopped[1]
    assert stopped[0]["best"] == [2, 2.0]
    assert stopped[0]["saved"] == [1, 2, 3]
    assert "after step 3 of 6" in stopped[0]["said"]


def test_processes_share_the_rows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches, seen = two_processes.step_batches(True), []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        seen.append([[batch.rows for batch in batches(at)] for at in (1, 2)])
    assert seen == [[[2, 1], [2]], [[2], []]]
