"""Too little memory, and numbers that are none: the job goes on with less at a time, or says why it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
from jobs import OUTPUT, Fault
from small_jobs import make_job, make_place

from conftest import colour_rows, write_jsonl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited with Linux's means")
MB = 1 << 20
WIDE: dict[str, Any] = {
    "data": {"train": "../rows/long.jsonl", "duplicates": "keep", "checks": False, "overlong": "truncate"},
    "train": {"steps": 2, "batch_size": 128, "micro_batch": 128, "evaluate_every": "off", "checkpoint_every": "off"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("limits"))
    rows = [{**row, "completion": " ".join([row["completion"]] * 40)} for row in colour_rows(128)]
    write_jsonl(root / "rows" / "long.jsonl", rows)
    return root


def events(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / OUTPUT / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def starve(directory: Path, memory: int) -> int:
    fault = Fault(1, "forward, training", does="starve", memory=memory)
    return jobs.train(directory, fault=fault)


def test_too_little_memory_halves_the_micro_batch_and_changes_no_gradient(root: Path) -> None:
    half = make_job(root, "half", **{**WIDE, "train": {**WIDE["train"], "micro_batch": 64}})
    assert jobs.train(half) == 0, jobs.said(half)
    # How much of the heap is free differs: a limit is looked for at which half fits and the whole does not, in the
    # first step already: one that was summed whole has other roundings.
    for memory in (150, 170, 130, 190, 110, 210):
        starved = make_job(root, f"starved-{memory}", **WIDE)
        if starve(starved, memory * MB) == 0 and any(
            event["event"] == "warning" and event["step"] == 1 for event in events(starved)
        ):
            break
    warnings = [event["message"] for event in events(starved) if event["event"] == "warning"]
    assert len(warnings) == 1 and "64 rows" in warnings[0], jobs.said(starved)
    found, expected = (jobs.traces(directory / OUTPUT) for directory in (starved, half))
    assert "adapter/adapter_model.safetensors" not in jobs.differences(found, expected)


def test_too_little_memory_twice_ends_with_the_plan_s_numbers(root: Path) -> None:
    directory = make_job(root, "twice", **WIDE)
    assert starve(directory, 8 * MB) == 1, jobs.said(directory)
    error = jobs.said(directory)
    assert "Traceback" not in error and "memory" in error and "MiB" in error and "→" in error
    assert not (directory / OUTPUT / "adapter").exists()


@pytest.mark.parametrize(
    ("kind", "rate", "steps"),
    [("lora", 1e30, 12), ("lora", 1e4, 12), ("full", 1e6, 12), ("lora", 1e-44, 4), ("full", 1e30, 1)],
)
def test_a_dead_run_never_ends_well(kind: str, rate: float, steps: int, root: Path) -> None:
    train = {"learning_rate": rate, "clip": "off", "steps": steps, "evaluate_every": "off", "checkpoint_every": 3}
    directory = make_job(root, f"dead-{kind}-{rate}-{steps}", method={"kind": kind}, train=train)
    assert jobs.train(directory) == 1, jobs.said(directory)
    said = jobs.said(directory)
    assert "error: " in said and "→" in said and "Traceback" not in said
    assert not (directory / OUTPUT / "adapter").exists() and not (directory / OUTPUT / "model").exists()
    assert not (directory / OUTPUT / "report.json").exists()
    assert not jobs.damage(directory / OUTPUT)
    assert jobs.train(directory, "--resume") == 1, jobs.said(directory)
    assert "Traceback" not in jobs.said(directory)
