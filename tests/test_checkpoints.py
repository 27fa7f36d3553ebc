"""What a checkpoint holds, which are kept, and where a run goes on after damage."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from trial import Trial, adapted, assert_equal, plan_of, two_micro_batches
from tunesmith.base import InputError, Interrupted, TunesmithError
from tunesmith.methods import Full, Lora
from tunesmith.objectives import Supervised
from tunesmith.recipe import TrainSpec
from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.loop import Progress, step

METHODS = {
    "lora": Lora(rank=4, dropout=0.1),
    "whole": Lora(rank=4, dropout=0.1, targets="qv", modules_to_save=["embed_tokens"]),
    "full": Full(),
}


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", "off"), ("adamw-8bit", "off"), ("adamw", 0.9)])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_with_the_same_bytes(name: str, optimizer: Any, ema: Any, tmp_path: Path) -> None:
    def trial(**settings: Any) -> Trial:
        spec = TrainSpec(optimizer=optimizer, schedule="cosine", keep=9, ema=ema)
        # Wide enough that bitsandbytes keeps some states in 8 bits.
        plan = plan_of(steps=6, checkpoint_every=2)
        return Trial(plan, spec, METHODS[name], tmp_path, hidden_size=64, **settings)

    torch.manual_seed(3)
    random.seed(3)
    whole = trial()
    torch.manual_seed(4)
    expected, drawn = whole.run(), random.random()
    interrupted = trial()
    torch.manual_seed(99)
    random.seed(99)
    progress = interrupted.restore(4)
    assert progress.step == 4
    resumed = interrupted.run(progress)
    assert_equal(interrupted.weights(), whole.weights())
    assert_equal(interrupted.kept().snapshot().averaged or {}, whole.kept().snapshot().averaged or {})
    assert random.random() == drawn
    assert resumed == expected
    without_time = [{**event, "seconds": 0} for event in whole.events]
    assert [{**event, "seconds": 0} for event in interrupted.events] == without_time[4:]


def test_the_scale_of_fp16_is_restored(tmp_path: Path) -> None:
    trial = Trial(plan_of(steps=2), directory=tmp_path, dtype=torch.float16)
    trial.precision.skip()
    trial.run()
    scale = trial.precision.scaler.get_scale()
    assert scale == 2.0**15
    again = Trial(plan_of(steps=2), directory=tmp_path, dtype=torch.float16)
    again.restore(2)
    assert again.precision.state() == trial.precision.state()


def test_a_checkpoint_before_the_first_update_can_be_restored(tmp_path: Path) -> None:
    trial = Trial(directory=tmp_path)
    trial.save(Progress(step=1), False)
    again = Trial(directory=tmp_path)
    assert again.restore(1) == Progress(step=1)
    assert_equal(again.weights(), trial.weights())


def test_a_stopped_run_writes_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    trial = Trial(plan_of(steps=5), directory=tmp_path, stop=at_call(3))
    with pytest.raises(Interrupted, match="after step 1 of 5") as caught:
        trial.run()
    assert caught.value.exit_code == 130
    assert trial.checkpoints.steps() == [1]
    again = Trial(plan_of(steps=5), directory=tmp_path)
    assert again.run(again.restore(1)).step == 5
    last = Trial(plan_of(steps=1), stop=at_call(3))
    assert last.run().step == 1


def at_call(number: int) -> Callable[[], bool]:
    """Somebody who asks a run to end when it looks for the n-th time: twice in a step, and once after it."""
    calls = iter(range(1, 1000))
    return lambda: next(calls) >= number


@pytest.mark.parametrize("inside", [1, 2])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_that_is_stopped_inside_a_step_leaves_no_trace_of_it(inside: int, name: str, tmp_path: Path) -> None:
    settings = {"method": METHODS[name], "directory": tmp_path / "whole"}
    whole = Trial(plan_of(steps=5), **settings)
    whole.run()
    stopped = Trial(plan_of(steps=5), **{**settings, "directory": tmp_path / "stopped"}, stop=at_call(6 + inside))
    with pytest.raises(Interrupted, match="after step 2 of 5"):
        stopped.run()
    again = Trial(plan_of(steps=5), **{**settings, "directory": tmp_path / "stopped"})
    again.run(again.restore(2))
    assert_equal(again.weights(), whole.weights())
    first = Trial(plan_of(steps=5), method=METHODS[name], stop=at_call(inside))
    with pytest.raises(Interrupted, match="before the first step was done"):
        first.run()


def test_a_run_that_is_stopped_while_it_evaluates_does_so_again(tmp_path: Path) -> None:
    plan = plan_of(steps=4, evaluate_every=2)
    losses = {2: 1.0, 4: 0.5}
    whole = Trial(plan)
    expected = whole.run(evaluate=losses.get)

    def interrupted(step: int) -> float:
        raise Interrupted("stopped while evaluating")

    stopped = Trial(plan, directory=tmp_path)
    with pytest.raises(Interrupted, match="stopped while evaluating; a checkpoint of step 2 is written"):
        stopped.run(evaluate=interrupted)
    again = Trial(plan, directory=tmp_path)
    progress = again.restore(2)
    assert progress.evaluation_due
    assert again.run(progress, evaluate=losses.get) == expected
    assert_equal(again.weights(), whole.weights())


def saved_at(directory: Path, steps: list[int], *, keep: int = 2, best: dict[int, int] | None = None) -> Trial:
    trial = Trial(spec=TrainSpec(keep=keep), directory=directory)
    for number in steps:
        step(trial.model, Supervised(), trial.optimizer, two_micro_batches(number))
        trial.save(Progress(step=number, best_step=(best or {}).get(number)), False)
    return trial


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 2).steps() == []
    trial = saved_at(tmp_path, [1, 2, 3, 4, 5], best={2: 2, 3: 2, 4: 2, 5: 2})
    assert trial.checkpoints.steps() == [2, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-4", "step-5"]
    trial.save(Progress(step=10, best_step=10), True)
    assert trial.checkpoints.steps() == [5, 10]


FILES = ("trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(name: str, damage: str, tmp_path: Path) -> None:
    checkpoints = saved_at(tmp_path, [1, 2]).checkpoints
    warnings: list[str] = []
    assert checkpoints.newest_sound(warnings.append) == 2 and not warnings
    file = checkpoints.path(2) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"" if damage == "empty" else content)
    if damage == "missing":
        file.unlink()
    assert checkpoints.newest_sound(warnings.append) == 1
    assert len(warnings) == 1 and "step-2 is damaged" in warnings[0]
    shutil.rmtree(checkpoints.path(1))
    assert checkpoints.newest_sound(warnings.append) is None


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"state.json": "x"}'])
def test_a_manifest_that_lists_nothing_vouches_for_nothing(manifest: str, tmp_path: Path) -> None:
    checkpoints = saved_at(tmp_path, [1]).checkpoints
    (checkpoints.path(1) / "manifest.json").write_text(manifest)
    assert checkpoints.newest_sound(lambda text: None) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_crowd_out_a_new_one(keep: int, tmp_path: Path) -> None:
    trial = saved_at(tmp_path, [4, 8, 12], keep=2)
    (trial.checkpoints.path(12) / "state.json").unlink()
    trial.checkpoints.keep = keep
    assert trial.checkpoints.newest_sound(lambda text: None) == 8
    trial.save(Progress(step=10), False)
    assert trial.checkpoints.steps() == [8, 10][-keep:]
    assert trial.checkpoints.newest_sound(lambda text: None) == 10


def test_damaged_weights_are_never_loaded(tmp_path: Path) -> None:
    trial = saved_at(tmp_path, [1])
    file = trial.checkpoints.path(1) / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = trial.weights()
    with pytest.raises(InputError, match=r"damaged \(trained\.safetensors has changed\)"):
        trial.checkpoints.load_weights(1, trial.model, trial.method)
    assert_equal(trial.weights(), before)


def test_weights_of_a_checkpoint_can_be_loaded_alone(tmp_path: Path) -> None:
    trial = saved_at(tmp_path, [1])
    expected = trial.weights()
    step(trial.model, Supervised(), trial.optimizer, two_micro_batches(1))
    trial.checkpoints.load_weights(1, trial.model, trial.method)
    assert_equal(trial.weights(), expected)
    with pytest.raises(InputError, match="do not fit the model"):
        trial.checkpoints.load_weights(1, adapted(METHODS["whole"]), METHODS["whole"])


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")

FAILURES = [FULL_DISK, SafetensorError("I/O error: No space left on device (os error 28)"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FAILURES, ids=["ENOSPC", "safetensors", "Ctrl-C"])
@pytest.mark.parametrize("survives", [0, 1, 2])
def test_nothing_half_written_is_left_behind(
    error: BaseException, survives: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = saved_at(tmp_path, [1, 2])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls: list[Path] = []

    def fails(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        path.write_bytes(b"half")
        if len(calls) > survives:
            raise error

    monkeypatch.setattr(checkpoint, "save_file", fails)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TunesmithError
    for number in (2, 3):  # over an older one, and beside it
        calls.clear()
        with pytest.raises(expected) as caught:
            trial.save(Progress(step=number), False)
    assert expected is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-1", "step-2"]
    assert trial.checkpoints.newest_sound(lambda text: None) == 2


def test_leftovers_of_a_killed_process_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = saved_at(tmp_path, [1]).checkpoints
    shutil.copytree(checkpoints.path(1), tmp_path / "step-2.partial123")
    (tmp_path / "step-3").write_text("a file")
    assert checkpoints.steps() == [1]


def test_checkpoints_of_another_version_are_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(directory=tmp_path)
    monkeypatch.setattr(checkpoint, "asdict", lambda progress: {"step": 1, "health": {}, "epoch": 3})
    trial.save(Progress(step=1), False)
    with pytest.raises(InputError, match="written by another version"):
        trial.restore(1)
