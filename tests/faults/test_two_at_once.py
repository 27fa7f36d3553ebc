"""One directory belongs to one job: whoever comes second is refused, and a dead job's lock holds nobody up."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import jobs
import pytest
from jobs import OUTPUT, RECIPE, Fault
from small_jobs import make_job, make_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched with Linux's means")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, str]:
    directory = make_job(root, "undisturbed")
    assert jobs.train(directory) == 0, jobs.said(directory)
    return jobs.traces(directory / OUTPUT)


def beside(directory: Path) -> Path:
    """Another job with the same output directory, which says what it says elsewhere."""
    other = directory.with_name(f"{directory.name}-other")
    other.mkdir()
    recipe = json.loads((directory / RECIPE).read_text())
    (other / RECIPE).write_text(json.dumps({**recipe, "output": f"../{directory.name}/{OUTPUT}"}))
    return other


def test_the_second_of_two_jobs_is_refused(root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, "second")
    other = beside(directory)
    first = jobs.start_and_wait(directory, named="forward, training", at=2)
    assert jobs.train(other) == 2
    assert f"../second/{OUTPUT}" in jobs.said(other)
    assert jobs.train(other, "--resume") == 2
    said = jobs.said(other)
    assert f"process {first.pid} is working in this run" in said and "→" in said
    jobs.go(directory)
    assert jobs.ended(first) == 0
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


def test_of_two_that_start_at_the_same_time_one_is_refused(root: Path, expected: dict[str, str]) -> None:
    """The first has looked and found nothing, and is about to make the directory."""
    directory = make_job(root, "same-time")
    other = beside(directory)
    late = jobs.start(other, "train", RECIPE, fault=Fault(1, does="wait", watched=(f"../{directory.name}/{OUTPUT}",)))
    jobs.wait_until((other / "paused").exists, late)
    first = jobs.start_and_wait(directory, named="forward, training", at=2)
    jobs.go(other)
    assert jobs.ended(late) == 2, jobs.said(other)
    assert "Traceback" not in jobs.said(other)
    jobs.go(directory)
    assert jobs.ended(first) == 0
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


@pytest.fixture(scope="module")
def killed(root: Path) -> Path:
    directory = make_job(root, "killed")
    assert jobs.train(directory, fault=Fault(3, "forward, training")) == -9
    return directory


def copy_of(killed: Path, name: str) -> Path:
    return shutil.copytree(killed, killed.with_name(name))


@pytest.mark.parametrize("lock", ["dead", "reused", "empty", "garbage"])
def test_a_stale_lock_is_taken_over(lock: str, killed: Path, expected: dict[str, str]) -> None:
    directory = copy_of(killed, f"stale-{lock}")
    path = directory / OUTPUT / "run.lock"
    assert path.exists()
    if lock == "reused":
        path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid()}))
    elif lock != "dead":
        path.write_text("" if lock == "empty" else "\0{]")
        os.utime(path, (0, 0))
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    assert not path.exists()
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


@pytest.mark.parametrize("at", [1, 2])
def test_of_two_that_take_over_one_is_refused(at: int, killed: Path, expected: dict[str, str]) -> None:
    """One has found that the lock is a dead job's, and is slow to act on it; another is quick."""
    directory = copy_of(killed, f"take-over-{at}")
    other = directory.with_name(f"{directory.name}-other")
    other.mkdir()
    (other / RECIPE).write_text((directory / RECIPE).read_text())
    os.symlink(directory / OUTPUT, other / OUTPUT)
    slow = jobs.start(other, "train", RECIPE, "--resume", fault=Fault(at, does="wait"))
    jobs.wait_until((other / "paused").exists, slow)
    quick = jobs.start(directory, "train", RECIPE, "--resume", fault=Fault(1, "forward, training", does="wait"))
    jobs.wait_until(lambda: (directory / "paused").exists() or quick.exitcode is not None)
    jobs.go(other)
    codes = {"slow": jobs.ended(slow)}
    jobs.go(directory)
    codes["quick"] = jobs.ended(quick)
    assert sorted(codes.values()) == [0, 2], codes
    assert "is working in this run" in jobs.said(other if codes["slow"] == 2 else directory)
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


def test_a_finished_run_is_neither_overwritten_nor_changed(root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, "finished")
    assert jobs.train(directory) == 0
    before = {path: path.read_bytes() for path in (directory / OUTPUT).rglob("*") if path.is_file()}
    assert jobs.train(directory) == 2
    assert "never overwritten" in jobs.said(directory) and "output=" in jobs.said(directory)
    assert jobs.train(directory, "--resume") == 0
    assert {path: path.read_bytes() for path in (directory / OUTPUT).rglob("*") if path.is_file()} == before
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


def test_another_directory_s_files_are_left_alone(root: Path) -> None:
    directory = make_job(root, "occupied")
    (directory / OUTPUT).mkdir()
    (directory / OUTPUT / "thesis.txt").write_text("years of work")
    assert jobs.train(directory) == 2
    assert "not an empty directory" in jobs.said(directory)
    assert jobs.train(directory, "--resume") == 2
    assert "not an empty directory" in jobs.said(directory)
    assert [path.name for path in (directory / OUTPUT).iterdir()] == ["thesis.txt"]
