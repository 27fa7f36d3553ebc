"""Bad steps are skipped, gone back from or end the run, as the recipe says; memory that runs out is asked for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trial import ROWS, Trial, assert_equal, plan_of
from tunesmith.base import TrainingError
from tunesmith.batch import Batch, pack
from tunesmith.methods import Lora
from tunesmith.objectives import Supervised
from tunesmith.recipe import TrainSpec
from tunesmith.train import loop
from tunesmith.train.trouble import Deadline, is_out_of_memory

PLAIN = Lora(rank=4)


def spec(**settings: Any) -> TrainSpec:
    return TrainSpec.model_validate({"schedule": "constant", **settings})


class Poisoned:
    """Batches of which those of one step have weights that are no numbers, or far too large."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def __call__(self, number: int, micro_batch: int | None = None) -> list[Batch]:
        size = micro_batch or 4
        batches = [pack(ROWS[at : at + size]) for at in range(0, len(ROWS), size)]
        if number == self.step:
            batches = [self.spoiled(batch) for batch in batches]
        return batches

    def spoiled(self, batch: Batch) -> Batch:
        weights = batch.tensors["target_weights"].clone()
        weights[weights > 0] *= self.factor
        return Batch(batch.token_ids, batch.positions, batch.segments, {"target_weights": weights}, batch.scopes)


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, factor: float = float("nan")) -> None:
    monkeypatch.setattr("trial.two_micro_batches", Poisoned(step, factor))


def warnings(trial: Trial) -> list[str]:
    return [event["message"] for event in trial.events if event["event"] == "warning"]


def test_a_bad_step_is_skipped_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 3)
    trial = Trial(plan_of(steps=6), spec(), PLAIN)
    progress = trial.run()
    assert progress.step == 6 and progress.health.skipped == 1
    assert [event["applied"] for event in trial.events] == [True, True, False, True, True, True]


def test_a_bad_step_ends_the_run_where_it_should(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poisoned(monkeypatch, 5)
    trial = Trial(plan_of(steps=8, checkpoint_every=2), spec(bad_step="stop"), PLAIN, tmp_path)
    with pytest.raises(TrainingError, match="step 5: loss or gradient was not a finite number") as caught:
        trial.run()
    assert caught.value.exit_code == 1 and trial.checkpoints.steps() == [2, 4]


def test_going_back_passes_the_rows_over_and_ends_as_if_they_had_not_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poisoned(monkeypatch, 5)
    trial = Trial(plan_of(steps=8, checkpoint_every=2), spec(bad_step="rollback"), PLAIN, tmp_path)
    progress = trial.run()
    assert progress.step == 8 and progress.passed_over == [5]
    assert "back to step 4, its rows are passed over" in warnings(trial)[0]
    assert [event["step"] for event in trial.events if event["event"] == "passed_over"] == [5]
    expected = Trial(plan_of(steps=8), spec(), PLAIN)
    start = loop.Progress(passed_over=[5])
    expected.run(start)
    assert_equal(trial.weights(), expected.weights())
    again = Trial(plan_of(steps=8), spec(bad_step="rollback"), PLAIN, tmp_path)
    assert again.restore(8).passed_over == [5], "a resumed run passes them over too"


def test_going_back_has_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = Poisoned(0, float("nan"))
    monkeypatch.setattr(
        "trial.two_micro_batches", lambda number, micro=None: list(map(bad.spoiled, bad(1))) if number > 3 else bad(1)
    )
    trial = Trial(plan_of(steps=9, checkpoint_every=2), spec(bad_step="rollback"), PLAIN, tmp_path)
    with pytest.raises(TrainingError, match="after going back 3 times"):
        trial.run()
    assert len(warnings(trial)) == 3
    early = Trial(plan_of(steps=9), spec(bad_step="rollback"), PLAIN, tmp_path / "none")
    with pytest.raises(TrainingError, match="no checkpoint to go back to") as caught:
        early.run()
    assert "checkpoint_every" in str(caught.value.fix)


class Loud(Supervised):
    """A loss that jumps with the number of its call."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"nll": super().loss(model, batch)["nll"] * float(batch.tensors["loudness"][0])}


@pytest.mark.parametrize(("bad_step", "applied"), [("skip", False), ("stop", None)])
def test_a_spike_is_a_bad_step_where_the_recipe_looks_for_it(
    bad_step: str, applied: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(number: int, micro_batch: int | None = None) -> list[Batch]:
        batch = pack(ROWS[:4])
        loudness = torch.full((4,), 9.0 if number == 7 else 1.0)
        return [
            Batch(
                batch.token_ids,
                batch.positions,
                batch.segments,
                {**batch.tensors, "loudness": loudness},
                {**batch.scopes, "loudness": "row"},
            )
        ]

    monkeypatch.setattr("trial.two_micro_batches", batches)
    monkeypatch.setattr("trial.Supervised", Loud)
    plain = Trial(plan_of(steps=8), spec(), PLAIN)
    plain.run()
    assert all(event["applied"] for event in plain.events)
    trial = Trial(plan_of(steps=8), spec(spike=3, bad_step=bad_step), PLAIN)
    if applied is None:
        with pytest.raises(TrainingError, match="step 7: the loss jumped to"):
            trial.run()
        return
    trial.run()
    assert [event["step"] for event in trial.events if not event["applied"]] == [7]


class Hungry(Supervised):
    """Needs more memory than there is for more than so many rows at a time."""

    most: int = 2

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        found = super().loss(model, batch)
        if batch.rows > self.most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return found


def test_memory_that_runs_out_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 0)
    method = Lora(rank=4, dropout=0.0)
    expected = Trial(plan_of(steps=4, micro_batch=4), spec(), method)
    expected.run()
    monkeypatch.setattr("trial.Supervised", Hungry)
    trial = Trial(plan_of(steps=4, micro_batch=4), spec(), method)
    progress = trial.run()
    assert progress.micro_batch == 2
    assert warnings(trial) == ["out of memory: from step 1 on 2 rows at a time; the gradient is the same"]
    for name, weight in expected.weights().items():
        torch.testing.assert_close(trial.weights()[name], weight, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_twice_ends_the_run_with_the_plan_s_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 0)
    monkeypatch.setattr("trial.Supervised", lambda: Hungry.model_validate({"most": 1}))
    memory = type("Memory", (), dict.fromkeys(("weights", "gradients", "optimizer", "activations", "runtime"), 2**30))
    memory.peak_bytes = 5 * 2**30  # type: ignore[attr-defined]
    trial = Trial(plan_of(steps=4, micro_batch=4, memory=memory), spec(), PLAIN)
    with pytest.raises(
        TrainingError, match=r"out of memory with 2 rows .* planned were 5,120 MiB: weights 1,024 MiB"
    ) as caught:
        trial.run()
    assert "gradient_checkpointing" in str(caught.value.fix)


def test_what_is_an_allocation_that_failed() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError("memory"))


def test_a_stop_that_takes_longer_than_a_preempted_job_has_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    deadline = Deadline(events.append)
    deadline.step_took(20.0, 2)
    clock = iter([0.0, 5.0, 0.0, 25.0, 0.0, 30.0])
    monkeypatch.setattr("tunesmith.train.trouble.time.perf_counter", lambda: next(clock))
    for step in (1, 2, 3):
        deadline.saving(step, lambda: None)
    [event] = events
    assert event["step"] == 2 and "needs about 35 s" in event["message"]
