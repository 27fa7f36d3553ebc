"""Ctrl-C and SIGTERM: a job ends soon, says how to go on, leaves no process behind, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import psutil
import pytest
from jobs import OUTPUT, RECIPE
from small_jobs import SCENARIOS, make_job, make_place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched with Linux's means")
JOB = SCENARIOS["lora, dropout, accumulation"]
SOON = 10.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, str]:
    directory = make_job(root, "undisturbed", **JOB)
    assert jobs.train(directory) == 0, jobs.said(directory)
    return jobs.traces(directory / OUTPUT)


def processes_of(session: int) -> list[psutil.Process]:
    """Everything that a job started: it leads a session of its own."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.parametrize(
    ("number", "named", "at"),
    [
        (signal.SIGTERM, "forward, training", 5),  # in the second step's accumulation window
        (signal.SIGINT, "forward, training", 5),
        (signal.SIGTERM, "forward, evaluating", 1),  # the base is judged
        (signal.SIGINT, "forward, evaluating", 5),  # validation
        (signal.SIGTERM, "tensors optimizer", 1),  # a checkpoint is written
        (signal.SIGTERM, "open run/evaluation.tuned", 1),
    ],
)
def test_a_signal_ends_a_job_well(
    number: signal.Signals, named: str, at: int, root: Path, expected: dict[str, str]
) -> None:
    directory = make_job(root, f"{number.name} {named.replace('/', ' ')} {at}", **JOB)
    process = jobs.start_and_wait(directory, named=named, at=at)
    os.kill(process.pid, number)
    jobs.go(directory)
    assert jobs.ended(process, SOON) == 130, jobs.said(directory)
    assert not processes_of(process.pid)
    said = jobs.said(directory).strip().splitlines()
    assert said[-2].startswith("error: stopped") and "--resume" in said[-1]
    assert "Traceback" not in jobs.said(directory)
    assert not jobs.damage(directory / OUTPUT)
    assert not jobs.leftovers(directory / OUTPUT)
    assert jobs.train(directory, "--resume") == 0, jobs.said(directory)
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


def test_a_second_signal_ends_a_job_at_once(root: Path, expected: dict[str, str]) -> None:
    directory = make_job(root, "twice", **JOB)
    process = jobs.start_and_wait(directory, named="tensors optimizer", at=2)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
    # The job still waits in the middle of its second checkpoint: it is the second signal alone that ends it.
    assert jobs.ended(process, SOON) == 130
    assert "Traceback" not in jobs.said(directory)
    assert jobs.newest(directory / OUTPUT) == 2 and not jobs.damage(directory / OUTPUT)
    assert not processes_of(process.pid)
    assert jobs.train(directory, "--resume") == 0
    assert not jobs.differences(jobs.traces(directory / OUTPUT), expected)


def test_ctrl_c_on_a_terminal_reaches_the_whole_job(root: Path, expected: dict[str, str]) -> None:
    """The command itself, and the signal to its whole group, as a terminal sends it."""
    steps = "train.steps=4000"
    directory = make_job(root, "terminal", **JOB)
    environment = {**os.environ, "TUNESMITH_DATA_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "train", RECIPE, steps],
        cwd=directory,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    events = directory / OUTPUT / "events.jsonl"
    jobs.wait_until(lambda: events.is_file() and '"step": 2' in events.read_text())
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=SOON)
    assert process.returncode == 130 and time.monotonic() - started < SOON
    assert "--resume" in said and "Traceback" not in said
    assert not processes_of(process.pid)
    assert jobs.newest(directory / OUTPUT) >= 2 and not jobs.damage(directory / OUTPUT)
