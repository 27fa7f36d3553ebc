"""NEFTune and the mean over rows: parity with transformers, split-invariance, resume, and silence while judging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from steps import assert_same, gradients, split
from test_near_base import recipe
from tiny import random_rows, tiny
from tunesmith.base import InputError, silent
from tunesmith.batch import Batch, pack
from tunesmith.evaluation.answers import mean_nll, row_nlls
from tunesmith.methods import Full, Lora, Prefix, Prompt
from tunesmith.models.forward import hidden_at, next_token_logps
from tunesmith.models.noise import NOISE
from tunesmith.objectives import Supervised
from tunesmith.pipeline.finetune import finetune

ROWS = random_rows((9, 17, 12, 30), weights=(0.5, 1.0))
LAYOUTS = (("packed", [[0], [1, 2], [3]]), ("padded", [range(4)]), ("padded", [[3, 0], [1, 2]]))


class Fixed(Supervised):
    """Draws the same number in every step, so that steps can be compared."""

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        torch.manual_seed(7)
        return super().prepare(model, window)


def embeddings_seen(model: Any, batch: Batch) -> Tensor:
    seen: list[Tensor] = []
    table = model.get_input_embeddings()
    hidden_at(model, batch, torch.tensor([1]))  # whatever is looked at only once
    # Registered while another hook adds the noise, this one would come first: read what the first norm is given.
    handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    try:
        hidden_at(model, batch, torch.tensor([1]))
    finally:
        handle.remove()
    assert table is not None
    return seen[-1].reshape(-1, seen[-1].shape[-1])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_noise_of_a_row_is_that_of_transformers(layout: Any) -> None:
    """The same draws give the same embeddings as its hook, which Trainer and TRL use."""
    model = tiny().train()
    [batch] = Fixed(noise=5.0).prepare(model, [pack(ROWS[1:2], layout)])
    found = embeddings_seen(model, batch)
    table: Any = model.get_input_embeddings()
    table.neftune_noise_alpha = 5.0
    handle = table.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(int(batch.tensors[NOISE][0, 0]))
    expected = table(ROWS[1].token_ids[None])[0]
    handle.remove()
    torch.testing.assert_close(found, expected.detach())


def test_each_row_has_the_bound_of_its_own_length() -> None:
    model = tiny().train()
    plain = pack(ROWS)
    [batch] = Fixed(noise=5.0).prepare(model, [plain])
    noise = embeddings_seen(model, batch) - embeddings_seen(model, plain)
    for start, length, _ in batch.segments.tolist():
        bound = 5.0 / math.sqrt(length * noise.shape[1])
        largest = float(noise[start : start + length].abs().max())
        assert 0.9 * bound < largest <= bound * 1.0001


@pytest.mark.parametrize("method", [Full(), Lora(rank=4), Prompt(tokens=3), Prefix(tokens=3, init="random")])
@pytest.mark.parametrize("average", ["tokens", "rows"])
def test_splitting_a_step_changes_nothing(method: Any, average: Any) -> None:
    model = tiny()
    torch.manual_seed(3)
    method.adapt(model)
    model.train()
    objective = Fixed(noise=5.0, average=average, label_smoothing=0.1)
    expected, whole = gradients(model, objective, split(ROWS, [range(4)], "packed"))
    silent_loss = gradients(model, Supervised(average=average, label_smoothing=0.1), [pack(ROWS)])[1].loss
    assert whole.loss != pytest.approx(silent_loss, rel=1e-6)
    for layout, parts in LAYOUTS:
        found, result = gradients(model, objective, split(ROWS, parts, layout))
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert_same(found, expected, 1e-4)


def test_steps_and_rows_get_different_noise() -> None:
    objective, model = Supervised(noise=5.0), tiny().train()
    torch.manual_seed(0)
    drawn = [objective.prepare(model, [pack(ROWS)])[0].tensors[NOISE] for _ in range(2)]
    assert len({float(value) for tensor in drawn for value in tensor[:, 0]}) == 8
    torch.manual_seed(0)
    assert torch.equal(objective.prepare(model, [pack(ROWS)])[0].tensors[NOISE], drawn[0])


def test_there_is_none_while_a_model_is_judged() -> None:
    model = tiny()
    assert row_nlls(model, ROWS, packed=True, progress=silent, objective=Supervised(noise=5.0)) == row_nlls(
        model, ROWS, packed=True, progress=silent
    )
    noisy, plain = (mean_nll(model, ROWS, packed=True, objective=Supervised(noise=noise)) for noise in (5.0, 0.0))
    assert noisy == plain
    assert Supervised().prepare(model, [pack(ROWS)])[0].tensors.keys() == {"target_weights"}


def test_the_mean_over_rows_by_hand() -> None:
    model = tiny()
    losses = []
    for row in ROWS:
        batch, weights = pack([row]), row.tensors["target_weights"]
        places = torch.nonzero(weights > 0).squeeze(1)
        logps = next_token_logps(model, batch, places - 1, row.token_ids[places])
        losses.append(float((-logps.detach() * weights[places]).sum() / weights.sum()))
    objective, batch = Supervised(average="rows"), pack(ROWS)
    assert float(objective.weights(batch)["nll"]) == 4
    assert float(objective.loss(model, batch)["nll"]) / 4 == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_head_alone_has_no_embeddings_to_disturb(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="read once") as error:
        finetune(recipe(tiny_model, rows_file, tmp_path / "run", method="head", objective={"kind": "sft", "noise": 5}))
    assert error.value.where == "objective.noise"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_gives_the_same_bytes(method: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    import os
    import signal

    from tunesmith.base import Interrupted
    from tunesmith.pipeline.finetune import Watcher

    def once(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    sections: dict[str, Any] = {"method": method, "objective": {"kind": "sft", "noise": 5, "average": "rows"}}
    train = {"learning_rate": 0.005, "micro_batch": 3}
    straight = finetune(recipe(tiny_model, rows_file, tmp_path / "one", **sections, train=train))
    asked = recipe(tiny_model, rows_file, tmp_path / "two", **sections, train=train)
    with pytest.raises(Interrupted):
        finetune(asked, watcher=Watcher(event=once))
    again = finetune(asked, resume=True)
    assert straight.result is not None and again.result is not None
    for path in straight.result.glob("*.safetensors"):
        assert path.read_bytes() == (again.result / path.name).read_bytes()
