"""Runs of many steps: what is told, when validation is measured, how a run ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import VOCABULARY
from trial import Trial, plan_of
from tunesmith.base import TrainingError
from tunesmith.methods import Full
from tunesmith.recipe import EarlyStopping, TrainSpec
from tunesmith.train.health import Health
from tunesmith.train.loop import Progress


def test_every_step_is_told() -> None:
    trial = Trial(plan_of(steps=3, warmup_steps=1), TrainSpec(schedule="linear"))
    progress = trial.run()
    assert [event["step"] for event in trial.events] == [1, 2, 3]
    keys = {"event", "step", "loss", "tokens", "targets", "seconds", "grad_norm", "learning_rate", "applied"}
    assert all(event.keys() == keys and event["event"] == "step" and event["applied"] for event in trial.events)
    assert [event["learning_rate"] for event in trial.events] == pytest.approx([0.005, 0.01, 0.005])
    assert progress.tokens == sum(event["tokens"] for event in trial.events) == 27 + 33 + 27
    assert progress.targets == sum(event["targets"] for event in trial.events) > 0
    assert trial.model.training and trial.saved == [(3, False)]


def test_clipping_follows_the_recipe() -> None:
    moved = {}
    for clip in (1e-6, "off"):
        trial = Trial(plan_of(steps=1), TrainSpec(clip=clip, schedule="constant"))  # pyright: ignore[reportArgumentType]
        trial.optimizer = torch.optim.SGD([p for p in trial.model.parameters() if p.requires_grad], lr=1.0)
        before = trial.weights()
        progress = trial.run()
        norm = math.sqrt(sum(float((t - before[n]).square().sum()) for n, t in trial.weights().items()))
        moved[clip] = norm / trial.plan.learning_rate
        assert progress.health.first_norm == pytest.approx(trial.events[0]["grad_norm"])
    assert moved[1e-6] == pytest.approx(1e-6, rel=1e-2)
    assert moved["off"] == pytest.approx(trial.events[0]["grad_norm"], rel=1e-2)


def stub(losses: dict[int, float | None]) -> tuple[Callable[[int], float | None], list[int]]:
    asked: list[int] = []

    def evaluate(number: int) -> float | None:
        asked.append(number)
        return losses.get(number)

    return evaluate, asked


def test_the_best_step_is_kept_and_patience_ends_the_run() -> None:
    spec = TrainSpec(schedule="constant", early_stopping=EarlyStopping(patience=2))
    trial = Trial(plan_of(steps=20, evaluate_every=2), spec)
    evaluate, asked = stub({2: 3.0, 4: 2.0, 6: 2.5, 8: 1.5, 10: 1.5, 12: 1.6, 14: 0.1})
    progress = trial.run(evaluate=evaluate)
    assert asked == [2, 4, 6, 8, 10, 12]
    assert (progress.step, progress.best_step, progress.best_loss, progress.stopped_early) == (12, 8, 1.5, True)
    assert trial.saved == [(2, True), (4, True), (8, True), (12, False)]


def test_a_gain_below_min_delta_is_none() -> None:
    spec = TrainSpec(schedule="constant", early_stopping=EarlyStopping(patience=2, min_delta=0.5))
    trial = Trial(plan_of(steps=9, evaluate_every=1), spec)
    evaluate, _ = stub({1: 3.0, 2: 2.9, 3: 2.4, 4: 2.3, 5: 2.0, 6: 1.0})
    progress = trial.run(evaluate=evaluate)
    assert (progress.step, progress.best_step, progress.best_loss) == (5, 3, 2.4)


def test_without_early_stopping_a_run_goes_to_its_end() -> None:
    trial = Trial(plan_of(steps=5, evaluate_every=2, checkpoint_every=3))
    evaluate, asked = stub({2: 1.0, 4: 2.0, 5: 3.0})
    progress = trial.run(evaluate=evaluate)
    assert asked == [2, 4, 5]
    assert (progress.step, progress.best_step, progress.stopped_early) == (5, 2, False)
    assert trial.saved == [(2, True), (3, False), (5, False)]


def test_a_validation_loss_that_is_no_number_is_never_the_best() -> None:
    trial = Trial(plan_of(steps=3, evaluate_every=1))
    evaluate, _ = stub({1: math.nan, 2: 2.0, 3: None})
    assert trial.run(evaluate=evaluate).best_step == 2


def test_evaluation_does_not_leave_the_model_in_its_mode() -> None:
    trial = Trial(plan_of(steps=2, evaluate_every=1))
    modes = []

    def evaluate(number: int) -> None:
        modes.append(trial.model.training)
        trial.model.eval()

    trial.run(evaluate=evaluate)
    assert modes == [True, True] and trial.model.training


def test_answers_can_be_asked_for_more_often_than_the_loss() -> None:
    trial = Trial(plan_of(steps=7, evaluate_every=4), TrainSpec(generate_every=3, schedule="constant"))
    evaluate, asked = stub({})
    trial.run(evaluate=evaluate)
    assert asked == [3, 4, 6, 7]
    nothing, silent = stub({})
    Trial(plan_of(steps=2)).run(evaluate=nothing)
    assert silent == []


def test_a_run_that_diverges_says_so_and_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    plan = plan_of(steps=40, checkpoint_every=2)
    trial = Trial(plan, method=Full(), directory=tmp_path)
    progress = trial.run(Progress(step=37, health=Health(vocabulary=VOCABULARY)))
    assert trial.checkpoints.steps() == [38, 40]
    plan.steps, plan.learning_rate = 80, 1e3
    progress = trial.restore(40)
    with pytest.raises(TrainingError, match=r"diverged|finite"):
        trial.run(progress)
    assert trial.checkpoints.newest_sound(lambda text: None) is not None
    assert progress.step < 80


def test_a_run_that_turns_out_dead_at_its_end_leaves_no_checkpoint_of_it() -> None:
    trial = Trial(plan_of(steps=3, learning_rate=1e3), method=Full())
    with pytest.raises(TrainingError, match=r"at the end|finite"):
        trial.run()
    assert trial.saved == []
