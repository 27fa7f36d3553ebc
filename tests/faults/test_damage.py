"""Damaged files: named, passed over for the checkpoint before, and the end is the same."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from jobs import OUTPUT, Fault
from small_jobs import make_job, make_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched with Linux's means")
JOB = {"train": {"steps": 5, "checkpoint_every": 1, "keep": 3}, "method": {"dropout": 0.2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, str]:
    directory = make_job(root, "undisturbed", **JOB)
    assert jobs.train(directory) == 0, jobs.said(directory)
    return jobs.traces(directory / OUTPUT)


@pytest.fixture(scope="module")
def killed(root: Path) -> Path:
    """A job that died in its fourth step."""
    directory = make_job(root, "killed", **JOB)
    assert jobs.train(directory, fault=Fault(4, "forward, training")) == -9
    assert jobs.newest(directory / OUTPUT) == 3
    return directory


def copy_of(killed: Path, name: str) -> Path:
    return shutil.copytree(killed, killed.with_name(name))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("trained.safetensors", flip),
        ("optimizer.safetensors", cut),
        ("state.json", cut),
        ("manifest.json", Path.unlink),
        ("manifest.json", flip),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_end_is_the_same(
    name: str, damages: Callable[[Path], None], killed: Path, expected: dict[str, str]
) -> None:
    directory = copy_of(killed, f"{damages.__name__}-{name}")
    damages(directory / OUTPUT / "checkpoints" / "step-3" / name)
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    said = jobs.said(directory)
    assert "step-3" in said and "damaged" in said
    # One bit of the manifest is a bit of some file's hash.
    assert name in said or (name == "manifest.json" and "has changed" in said)
    # What was damaged is told in the events and in the report; everything else is as it would have been.
    told = {"events.jsonl", "report.json"}
    assert set(jobs.differences(jobs.traces(directory / OUTPUT), expected)) <= told


def test_when_all_checkpoints_are_damaged_the_run_begins_again_and_says_so(
    killed: Path, expected: dict[str, str]
) -> None:
    directory = copy_of(killed, "all")
    for path in (directory / OUTPUT).glob("checkpoints/step-*/trained.safetensors"):
        flip(path)
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    said = jobs.said(directory)
    assert all(f"step-{number} is damaged" in said for number in (1, 2, 3))
    assert set(jobs.differences(jobs.traces(directory / OUTPUT), expected)) <= {"events.jsonl", "report.json"}


@pytest.mark.parametrize("tail", ['{"event": "step", "step": 4, "lo', "\0\0\0\0"])
def test_events_that_were_cut_off_are_written_again(tail: str, killed: Path, expected: dict[str, str]) -> None:
    directory = copy_of(killed, f"tail-{len(tail)}")
    events = directory / OUTPUT / "events.jsonl"
    text = events.read_text()
    events.write_text(text + tail)
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


@pytest.mark.parametrize("name", ["plan.json", "data.json", "recipe.yaml"])
def test_a_damaged_file_of_the_run_is_named(name: str, killed: Path) -> None:
    directory = copy_of(killed, f"cut-{name}")
    cut(directory / OUTPUT / name)
    code, said = jobs.train(directory, "--resume"), jobs.said(directory)
    assert code == 2, said
    assert name in said and "Traceback" not in said and "→" in said


def test_a_log_that_lost_its_end_is_told_and_written_on(killed: Path, expected: dict[str, str]) -> None:
    directory = copy_of(killed, "log")
    events = directory / OUTPUT / "events.jsonl"
    events.write_text(events.read_text()[:-1])
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    assert "events.jsonl was cut off" in jobs.said(directory)
    told = {"events.jsonl", "report.json"}
    assert set(jobs.differences(jobs.traces(directory / OUTPUT), expected)) <= told


def test_a_damaged_evaluation_of_the_base_is_measured_again(killed: Path, expected: dict[str, str]) -> None:
    directory = copy_of(killed, "evaluation")
    cut(directory / OUTPUT / "evaluation.base.json")
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)
