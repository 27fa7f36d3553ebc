"""The running average of trained weights: its formula, and that it is what is judged and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import colour_rows, write_jsonl
from trial import Trial, assert_equal, plan_of
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe import EarlyStopping, TrainSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.train.checkpoint import Checkpoints

EMA = TrainSpec(schedule="constant", ema=0.6, keep=9)


def after(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trial = Trial(plan_of(steps=steps))
    trial.run()
    return trial.weights()


def test_it_is_the_exponential_average_of_the_weights_after_every_step() -> None:
    torch.manual_seed(0)
    expected = Trial().weights()
    for t in range(8):
        decay = min(0.6, (1 + t) / (10 + t))
        expected = {name: decay * expected[name] + (1 - decay) * now for name, now in after(t + 1).items()}
    torch.manual_seed(0)
    trial = Trial(plan_of(steps=8), EMA)
    trial.run()
    assert_equal(trial.weights(), after(8))  # the optimizer goes on as if there were no average
    assert trial.average is not None and trial.average.updates == 8
    with trial.average.in_place():
        for name, tensor in trial.weights().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_a_step_that_is_not_applied_leaves_the_average() -> None:
    trial = Trial(plan_of(steps=3), EMA.model_copy(update={"spike": 1e-9 + 1}))
    trial.run()
    steps = [event for event in trial.events if event["event"] == "step"]
    assert trial.average is not None and trial.average.updates == sum(event["applied"] for event in steps)


def test_validation_sees_the_average_and_the_best_checkpoint_is_the_one_it_saw(tmp_path: Path) -> None:
    trial = Trial(plan_of(steps=6, evaluate_every=1), EMA, directory=tmp_path)
    seen: dict[int, dict[str, Tensor]] = {}
    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: 1.5, 5: 1.6, 6: 1.7}

    def evaluate(at: int) -> float:
        seen[at] = trial.weights()
        return losses[at]

    progress = trial.run(evaluate=evaluate)
    assert progress.best_step == 3
    assert not torch.equal(next(iter(seen[6].values())), next(iter(trial.weights().values())))
    trial.checkpoints.load_weights(3, trial.model, trial.method)
    assert_equal(trial.weights(), seen[3])


def test_patience_counts_evaluations_of_the_average(tmp_path: Path) -> None:
    spec = EMA.model_copy(update={"early_stopping": EarlyStopping(patience=2)})
    trial = Trial(plan_of(steps=9, evaluate_every=1), spec, directory=tmp_path)
    losses = iter([2.0, 1.0, 1.5, 1.2])
    progress = trial.run(evaluate=lambda at: next(losses))
    assert (progress.step, progress.best_step, progress.stopped_early) == (4, 2, True)


def test_going_back_takes_the_average_along(tmp_path: Path) -> None:
    trial = Trial(plan_of(steps=2, checkpoint_every=1), EMA, directory=tmp_path)
    trial.run()
    snapshot = trial.kept().snapshot()
    trial.plan.steps = 4
    trial.run(trial.restore(2))
    trial.restore(2)
    assert_equal(trial.kept().snapshot().averaged or {}, snapshot.averaged or {})
    assert trial.average is not None and trial.average.updates == 2


def test_a_run_that_averages_only_from_its_resuming_on_begins_with_the_weights_it_has(tmp_path: Path) -> None:
    plain = Trial(plan_of(steps=2), directory=tmp_path)
    plain.run()
    trial = Trial(plan_of(steps=2), EMA, directory=tmp_path)
    trial.restore(2)
    assert_equal(trial.kept().snapshot().averaged or {}, plain.weights())


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_average_is_named(damage: str, tmp_path: Path) -> None:
    Trial(plan_of(steps=2), EMA, directory=tmp_path).run()
    file = tmp_path / "step-2" / "averaged.safetensors"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-1])
    assert "averaged.safetensors" in (Checkpoints(tmp_path, 1).damage(2) or "")


def test_the_result_of_a_run_is_the_average(tiny_model: Path, tmp_path: Path) -> None:
    def run(name: str, **train: Any) -> Any:
        return finetune(
            check_recipe(
                {
                    "model": str(tiny_model),
                    "data": {"train": str(rows), "validation": 0.2, "test": 0.2},
                    "method": {"kind": "lora", "rank": 2},
                    "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "dtype": "fp32", **train},
                    "evaluate": {"max_new_tokens": 4, "resamples": 20, "rows": 4, "forgetting": "off"},
                    "output": str(tmp_path / name),
                },
                "test",
            )
        )

    rows = write_jsonl(tmp_path / "rows.jsonl", colour_rows(24))
    from safetensors.torch import load_file

    for name, best, at in (("best", "validation-loss", None), ("last", "last", 6)):
        done = run(name, ema=0.9, best=best, keep=9)
        end = next(event for event in done.events() if event["event"] == "trained")
        found = load_file(done.path / "adapter" / "adapter_model.safetensors")
        checkpoint = done.checkpoints / f"step-{at or end['best_step']}"
        assert_equal(found, load_file(checkpoint / "averaged.safetensors"))
    assert run("plain").read("plan.json")["memory"]["copies"] < done.read("plan.json")["memory"]["copies"]
