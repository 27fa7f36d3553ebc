"""`tunesmith runs verify`: what has changed is found and named, what is gone is said, and the exit code tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import colour_rows, write_jsonl
from past_runs import past_run
from tunesmith.base import InputError
from tunesmith.cli.app import app
from tunesmith.pipeline.fingerprints import differences, fingerprints
from tunesmith.pipeline.verifying import verify_run
from tunesmith.run import Run


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, data, a run, and a run on that run's model."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_model, place / "base")
    past_run(place / "base", place, method="full")
    past_run(place / "first" / "model", place, "second")
    return place


@pytest.fixture
def place(made: Path) -> Any:
    """The same, to be damaged; it is put back afterwards, for runs remember where their base and data are."""
    shutil.copytree(made, made.with_name("kept"))
    yield made
    shutil.rmtree(made)
    made.with_name("kept").rename(made)


def verify(run: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["runs", "verify", str(run), *options])


def parts(run: Path) -> dict[str, dict[str, Any]]:
    done = verify(run, "--json")
    report = json.loads(done.stdout)
    assert report["changed"] == (done.exit_code == 2) == any(part["state"] == "changed" for part in report["parts"])
    return {part["name"]: part for part in report["parts"]}


def test_a_run_that_nothing_happened_to_is_all_right(made: Path) -> None:
    done = verify(made / "second")
    assert done.exit_code == 0, done.output
    names = ("files", "checkpoint step-1", "checkpoint step-2", "train ", "test ", "base ", "parent ../first")
    lines = done.stdout.splitlines()
    for name in names:
        assert any(line.startswith("✓ ok") and name in line for line in lines), name
    assert lines[-1].endswith("all that is here is as it was")


def test_every_changed_file_of_the_run_is_named(place: Path) -> None:
    run = place / "first"
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run / "report.json").write_text("{}")
    (run / "plan.json").unlink()
    (run / "model" / "extra.safetensors").write_bytes(b"x")
    (run / "notes.md").write_text("mine")
    done = verify(run)
    assert done.exit_code == 2
    for said in (
        "model/model.safetensors has changed",
        "report.json has changed (2 bytes",
        "plan.json is missing",
        "model/extra.safetensors was not there when the run ended",
        "train it again: sh ",
        "parts changed: files",
    ):
        assert said in done.stdout, said
    assert "notes.md" not in done.stdout
    assert len(parts(run)["files"]["findings"]) == 4


def test_a_damaged_checkpoint_is_named(place: Path) -> None:
    file = place / "first" / "checkpoints" / "step-1" / "state.json"
    file.write_text(file.read_text() + " ")
    part = parts(place / "first")["checkpoint step-1"]
    assert part["state"] == "changed" and "state.json has changed" in part["detail"]
    assert "remove" in part["fix"] and "the result does not need it" in part["fix"]


def test_changed_data_is_an_error_and_data_that_is_gone_is_not(place: Path) -> None:
    write_jsonl(place / "rows.jsonl", colour_rows(47))
    name = f"train {place / 'rows.jsonl'}"
    part = parts(place / "first")[name]
    assert part["state"] == "changed" and f"{place / 'rows.jsonl'} has changed" in part["detail"]
    (place / "rows.jsonl").unlink()
    done = verify(place / "first")
    assert done.exit_code == 0
    assert (
        "! gone" in done.stdout
        and "it is no longer in" in done.stdout
        and f"as it was; not checked: {name}" in done.stdout
    )
    (place / "rows.jsonl").mkdir()
    (place / "rows.jsonl" / "a").write_text("now a directory")
    assert parts(place / "first")[name]["state"] == "changed"


def test_a_changed_base_is_found(place: Path) -> None:
    (place / "base" / "config.json").write_text("{}")
    part = parts(place / "first")[f"base {place / 'base'}"]
    assert part["state"] == "changed" and part["findings"][0].startswith("config.json has changed")
    shutil.rmtree(place / "base")
    part = parts(place / "first")[f"base {place / 'base'}"]
    assert part["state"] == "gone" and "put it back" in part["fix"]


def test_a_parent_that_is_gone_or_another(place: Path) -> None:
    recipe = place / "first" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# later\n")
    part = parts(place / "second")["parent ../first"]
    assert part["state"] == "changed" and "another run is in" in part["detail"]
    shutil.rmtree(place / "first")
    found = parts(place / "second")
    assert found["parent ../first"]["state"] == "gone" and found[f"base {place / 'first' / 'model'}"]["state"] == "gone"


def test_a_run_that_is_not_finished_has_no_manifest_and_that_is_no_error(place: Path) -> None:
    run = place / "first"
    for name in ("manifest.json", "report.json"):
        (run / name).unlink()
    done = verify(run)
    assert done.exit_code == 0
    assert "· not checked" in done.stdout and "because it is not finished" in done.stdout
    assert "finish it with --resume" in done.stdout


def test_a_run_of_an_older_version_is_checked_as_far_as_it_can_be(place: Path) -> None:
    run = place / "first"
    for name in ("manifest.json", "lineage.json"):
        (run / name).unlink()
    found = parts(run)
    assert found["files"]["state"] == found["base"]["state"] == "not checked"
    assert "older version" in found["base"]["detail"]
    assert found[f"train {place / 'rows.jsonl'}"]["state"] == "ok"
    shutil.rmtree(place / "base")
    (place / "rows.jsonl").unlink()
    assert parts(run)[f"train {place / 'rows.jsonl'}"]["state"] == "not checked"


def test_a_run_that_moved_with_its_project_is_checked_from_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    past_run(tiny_model, Path("."), "runs/one")
    here.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert parts(Path("runs/one"))["train rows.jsonl"]["state"] == "ok"
    assert verify(tmp_path / "there" / "runs" / "one").exit_code == 0


def test_what_is_no_run_or_cannot_be_read_is_an_error(place: Path) -> None:
    with pytest.raises(InputError, match="there is no run here"):
        verify_run(Run.open(place))
    (place / "first" / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="it does not list files"):
        verify_run(Run(place / "first"))


@given(
    st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=8)),
    st.dictionaries(st.sampled_from("abcd"), st.binary(max_size=8)),
)
@settings(max_examples=60, deadline=None)
def test_exactly_what_differs_is_told(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file, content in before.items():
            (directory / file).write_bytes(content)
        taken = fingerprints(directory, before, "", lambda *_: None)
        for file in before:
            (directory / file).unlink()
        for file, content in after.items():
            (directory / file).write_bytes(content)
        told = differences(directory, taken, "", lambda *_: None)
    assert {text.split()[0] for text in told} == {file for file in before if after.get(file) != before[file]}
