"""A disk that is too small, fills up, or cannot be written: real file systems, in memory."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jobs
import pytest
from small_jobs import make_job, make_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="small file systems are mounted with Linux's means")
RUN = "disk/run"
ROOMY = "64m"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, str]:
    directory = make_job(root, "undisturbed", output=RUN)
    assert jobs.train(directory) == 0, jobs.said(directory)
    return jobs.traces(directory / RUN)


@contextmanager
def disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; skips where nobody may mount one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Takes all the room there is, as another program would."""
    block = b"\1" * 4096
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_disk_that_is_too_small_is_refused_before_the_start(root: Path) -> None:
    directory = make_job(root, "too-small", output=RUN)
    with disk(directory / "disk", "64k") as place:
        assert jobs.train(directory) == 2, jobs.said(directory)
        said = jobs.said(directory)
        assert "error: " in said and RUN in said and "→" in said and "Traceback" not in said
        error = said[said.index("error: ") :]
        assert re.search(r"needs about [1-9][\d.]* MB .* 0(\.\d+)? MB", error)
        assert not any(place.iterdir())


@pytest.mark.parametrize(
    ("named", "at"),
    [
        ("os.rename disk/run/evaluation.base", 1),
        ("tensors optimizer", 2),
        ("tensors adapter_model", 1),
        ("forward, evaluating", 9),  # the tuned model is judged
    ],
)
def test_a_disk_that_fills_up_costs_nothing_but_time(named: str, at: int, root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, f"full-{named.replace('/', '-')}", output=RUN)
    with disk(directory / "disk", ROOMY) as place:
        fault = jobs.Fault(at, named, does="wait", watched=("disk",))
        process = jobs.start(directory, "train", jobs.RECIPE, fault=fault)
        jobs.wait_until((directory / "paused").exists, process)
        stood = jobs.newest(directory / RUN)
        fill(place / "other")
        jobs.go(directory)
        code, said = jobs.ended(process), jobs.said(directory)
        assert code == 1, said
        assert "Traceback" not in said
        error = said[said.rindex("\nerror: ") :]
        assert RUN in error and "room" in error and "--resume" in error
        assert not jobs.damage(directory / RUN)
        assert jobs.newest(directory / RUN) >= stood
        assert {path.name for path in place.iterdir()} == {"other", "run"}
        (place / "other").unlink()
        assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
        assert not jobs.differences(jobs.traces(directory / RUN), expected)
        assert not jobs.leftovers(directory / RUN)


def test_a_disk_that_is_still_full_is_said_again(root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, "still-full", output=RUN)
    with disk(directory / "disk", ROOMY) as place:
        fault = jobs.Fault(1, "os.mkdir disk/run/adapter", watched=("disk",))
        assert jobs.train(directory, fault=fault) == -9
        fill(place / "other")
        code, said = jobs.train(directory, "--resume"), jobs.said(directory)
        assert code in (1, 2) and "room" in said and RUN in said and "Traceback" not in said
        assert jobs.newest(directory / RUN) == 4 and not jobs.damage(directory / RUN)
        (place / "other").unlink()
        assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
        assert not jobs.differences(jobs.traces(directory / RUN), expected)


def test_a_read_only_disk_is_refused(root: Path) -> None:
    directory = make_job(root, "read-only", output=RUN)
    with disk(directory / "disk", ROOMY) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        refused(directory, "ead-only")


def test_a_run_on_a_disk_that_became_read_only_is_refused(root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, "became-read-only", output=RUN)
    with disk(directory / "disk", ROOMY) as place:
        assert jobs.train(directory, fault=jobs.Fault(3, "forward, training", watched=("disk",))) == -9
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        refused(directory, "ead-only", "--resume")
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
        assert not jobs.differences(jobs.traces(directory / RUN), expected)


def test_a_directory_that_cannot_be_made_is_refused(root: Path) -> None:
    directory = make_job(root, "not-a-directory", output=RUN)
    (directory / "disk").write_text("a file")
    refused(directory, "directory")


def refused(directory: Path, why: str, *more: str) -> None:
    """One clear error, before anything expensive, that names the place and what to do."""
    assert jobs.train(directory, *more) == 2, jobs.said(directory)
    said = jobs.said(directory)
    assert said.count("error: ") == 1 and "Traceback" not in said
    error = said[said.index("error: ") :]
    assert RUN in error and why in error and "→" in error
    assert "step 1" not in said
