"""What a run knows of where it comes from, the list of what it left, and the script that makes it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from past_runs import past_run, recipe_for
from tunesmith.base import InputError
from tunesmith.cli.app import app
from tunesmith.data.read import Reading, content_hash
from tunesmith.files import file_sha256
from tunesmith.models.templates import NAMED_TEMPLATES
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.lineage import (
    LINEAGE,
    MANIFEST,
    describe_lineage,
    manifest_files,
    parent_directory,
    read_lineage,
    run_of_base,
    write_lineage,
)
from tunesmith.pipeline.locating import run_recipe
from tunesmith.pipeline.merging import merge_run
from tunesmith.pipeline.origin import dependency_versions
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.reproduce import REPRODUCE, reproduce_script
from tunesmith.run import Run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("it's a place")


@pytest.fixture(scope="module")
def first(tiny_model: Path, place: Path) -> Run:
    model = shutil.copytree(tiny_model, place / "model one")
    (model / "README.md").write_text("nothing that is read")
    template = place / "template.jinja"
    template.write_text(NAMED_TEMPLATES["chatml"])
    return past_run(model, place, data={"template": str(template)})


@pytest.fixture(scope="module")
def whole(tiny_model: Path, place: Path) -> Run:
    return past_run(tiny_model, place, "whole", method="full")


@pytest.fixture(scope="module")
def child(whole: Run, place: Path) -> Run:
    return past_run(whole.path / "model", place, "child")


def test_a_run_knows_base_data_and_versions(first: Run, place: Path) -> None:
    lineage = read_lineage(first)
    assert lineage is not None
    base = lineage["base"]
    assert base["name"] == base["location"] == str(place / "model one") and base["from"] == "directory"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= base["files"].keys()
    assert "README.md" not in base["files"]
    for name, entry in base["files"].items():
        file = place / "model one" / name
        assert entry == {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    roles = {source["role"]: source for source in lineage["data"]}
    assert roles["train"]["sha256"] == file_sha256(place / "rows.jsonl")
    assert roles["test"]["location"] == str(place / "held-out.jsonl")
    assert [(text["role"], text["path"]) for text in lineage["texts"]] == [("template", str(place / "template.jinja"))]
    assert lineage["parents"] == []
    assert lineage["versions"]["torch"] and lineage["versions"]["numpy"]
    assert len(lineage["tunesmith"]["source_sha256"]) == 64


def test_the_same_job_writes_the_same_lineage(first: Run) -> None:
    before = (first.path / LINEAGE).read_bytes()
    write_lineage(first, plan_job(run_recipe(first)), None)
    assert (first.path / LINEAGE).read_bytes() == before


def test_progress_counts_the_bytes_of_the_base(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    planned = plan_job(recipe_for(tiny_model, tmp_path))
    lineage = describe_lineage(tmp_path / "run", planned, None, lambda *at: seen.append(at))
    total = sum(entry["bytes"] for entry in lineage["base"]["files"].values())
    assert seen[-1] == ("hashing the base", total, total)


def test_a_base_of_the_hub_is_known_by_its_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    planned = plan_job(recipe_for(cache / "snapshots" / COMMIT, tmp_path))
    inside = describe_lineage(tmp_path / "run", planned, None)
    assert inside["base"]["commit"] == COMMIT and inside["base"]["from"] == "directory"
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    by_name = planned.with_plan(planned.plan)
    object.__setattr__(by_name, "location", "org/tiny")
    base = describe_lineage(tmp_path / "run", by_name, None)["base"]
    assert (base["from"], base["commit"]) == ("hub", COMMIT)
    assert base["files"] == inside["base"]["files"]
    object.__setattr__(by_name, "location", "org/not-here")
    assert describe_lineage(tmp_path / "run", by_name, None)["base"]["files"] == {}


def test_a_run_on_the_result_of_another_is_its_child(whole: Run, child: Run, tmp_path: Path) -> None:
    lineage = read_lineage(child)
    assert lineage is not None
    (parent,) = lineage["parents"]
    assert parent == {"how": "base", "run": "../whole", "recipe_sha256": file_sha256(whole.path / "recipe.yaml")}
    assert parent_directory(child, parent) == whole.path
    moved = Run(shutil.copytree(child.path, tmp_path / "child"))
    assert parent_directory(moved, parent) == tmp_path / "whole", "runs that are moved together find each other"


def test_a_merged_model_leads_to_the_run_of_its_adapter(first: Run, place: Path) -> None:
    merge_run(str(first.path), place / "merged")
    assert run_of_base(place / "merged") == first.path
    note = json.loads((place / "merged" / "merge.json").read_text())
    (place / "merged" / "merge.json").write_text(json.dumps({**note, "adapter": "first/adapter"}))
    assert run_of_base(place / "merged") == first.path, "a relative name is looked for from the directories above"
    (place / "merged" / "merge.json").write_text(json.dumps({**note, "adapter": "elsewhere/adapter"}))
    assert run_of_base(place / "merged") is None


def test_a_damaged_lineage_is_named(first: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(first.path, tmp_path / "copy"))
    for text, said in (("{", "damaged"), ("[]", "it is not what a run writes")):
        (copy.path / LINEAGE).write_text(text)
        with pytest.raises(InputError, match=said) as caught:
            read_lineage(copy)
        assert str(caught.value.where).startswith(str(copy.path / LINEAGE))


def test_the_manifest_lists_what_the_run_left(first: Run, tmp_path: Path) -> None:
    files = first.read(MANIFEST)["files"]
    assert {"recipe.yaml", "events.jsonl", "report.json", "adapter/adapter_model.safetensors", LINEAGE} <= files.keys()
    assert not any(name.startswith("checkpoints/") or name in (MANIFEST, "run.lock") for name in files)
    assert all(entry["sha256"] == file_sha256(first.path / name) for name, entry in files.items())
    copy = shutil.copytree(first.path, tmp_path / "copy")
    for name in ("tensorboard/events", "wandb/log", "run.lock", "plan.json.partial77", "inner/recipe.yaml", "notes.md"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    assert set(manifest_files(copy)) - files.keys() == {"notes.md"}


def test_a_run_that_died_as_it_wrote_its_manifest_gets_one_and_keeps_no_part(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model, tmp_path)
    run = finetune(recipe)
    before = run.read(MANIFEST)
    (run.path / MANIFEST).rename(run.path / f"{MANIFEST}.partial99999999")
    finetune(recipe, resume=True)
    assert run.read(MANIFEST) == before
    assert not list(run.path.glob("*.partial*"))


def test_versions_are_those_of_everything_that_is_needed() -> None:
    versions = dependency_versions()
    assert {"torch", "transformers", "numpy", "regex"} <= versions.keys()
    assert not {"tunesmith", "pytest", "ruff"} & versions.keys()


# --- the script ---


def shell(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["sh", str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_script_is_posix_shell(first: Run) -> None:
    assert subprocess.run(["sh", "-n", str(first.path / REPRODUCE)], capture_output=True).returncode == 0
    wrong = shell(first.path / REPRODUCE, "trian", cwd=first.path)
    assert wrong.returncode == 2 and "unknown step 'trian'" in wrong.stderr


def test_the_script_checks_data_and_base(first: Run, place: Path) -> None:
    script = first.path / REPRODUCE
    right = shell(script, "check", cwd=place)
    assert right.returncode == 0, right.stderr
    assert f"ok: {place / 'rows.jsonl'}" in right.stdout and "model.safetensors" in right.stdout
    before = (place / "rows.jsonl").read_bytes()
    try:
        (place / "rows.jsonl").write_bytes(before + b"\n")
        changed = shell(script, "check", cwd=place)
        assert changed.returncode == 2 and f"changed: {place / 'rows.jsonl'}" in changed.stderr
        (place / "rows.jsonl").unlink()
        missing = shell(script, "check", cwd=place)
        assert missing.returncode == 2 and f"missing: {place / 'rows.jsonl'}" in missing.stderr
    finally:
        (place / "rows.jsonl").write_bytes(before)


def test_the_script_hashes_directories_as_the_reader_does(first: Run, place: Path, tmp_path: Path) -> None:
    for name in ("b/one.arrow", "a.json", "b.txt", "ü/x"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(name)
    lineage = first.read(LINEAGE)
    entry = {"path": "set", "role": "train", "location": str(tmp_path / "set"), "split": "train"}
    entry["sha256"] = content_hash(Reading(str(tmp_path / "set"), split="train"))
    hub = {"path": "org/rows", "role": "test", "location": None, "split": None, "sha256": "0" * 64}
    script = tmp_path / "reproduce.sh"
    text = reproduce_script({**lineage, "data": [entry, hub]}, first.read("environment.json"), "runs/x")
    script.write_text(text, encoding="utf-8")
    done = shell(script, "check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ok: set" in done.stdout and "not checked: org/rows" in done.stdout


def test_the_script_trains_to_the_same_bytes(first: Run, place: Path) -> None:
    none = shell(first.path / REPRODUCE, "train", cwd=place)
    assert none.returncode == 2 and "first: sh reproduce.sh environment" in none.stderr
    source = str(Path(__file__).parents[1] / "src")
    output = 'out: "of" #1'
    done = shell(first.path / REPRODUCE, "train", cwd=place, VENV=sys.prefix, OUTPUT=output, PYTHONPATH=source)
    assert done.returncode == 0, done.stderr
    assert "the same bytes: adapter/adapter_model.safetensors" in done.stdout
    assert (place / output / "report.json").is_file()


def test_the_script_names_nothing_of_this_machine_but_what_the_recipe_names(
    first: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_for(tiny_model, tmp_path)
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    planned = plan_job(recipe_for("./model", Path("."), "runs/x"))
    lineage = describe_lineage(Path("runs/x"), planned, None)
    text = reproduce_script(lineage, first.read("environment.json"), "runs/x")
    home = str(Path(__file__).parents[1])
    assert str(tmp_path) not in text and home not in text and sys.prefix not in text
    assert "output=runs/x-reproduced" in text


def test_the_script_installs_the_versions_of_the_run(first: Run, tmp_path: Path) -> None:
    lineage, environment = first.read(LINEAGE), first.read("environment.json")
    torch = "2.13.0+cpu"
    environment = {**environment, "versions": {**environment["versions"], "torch": torch}, "processes": 2}
    released = {**lineage, "tunesmith": {**lineage["tunesmith"], "from": "index", "version": "9.8.7"}}
    text = reproduce_script(released, environment, "runs/x")
    assert f"transformers=={environment['versions']['transformers']}" in text
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in text and f"torch=={torch}" in text
    assert 'tunesmith="${TUNESMITH:-tunesmith==9.8.7}"' in text
    assert "torch.distributed.run --nproc-per-node 2 -m tunesmith train" in text
    assert f"OMP_NUM_THREADS={environment['threads']}" in text
    checkout = {**lineage["tunesmith"], "from": "checkout", "commit": COMMIT, "changed": True}
    script = tmp_path / "reproduce.sh"
    script.write_text(reproduce_script({**lineage, "tunesmith": checkout}, environment, "runs/x"), encoding="utf-8")
    asked = shell(script, "environment", cwd=tmp_path, VENV=str(tmp_path / "venv"))
    assert asked.returncode != 0 and "set TUNESMITH to the path" in asked.stderr and COMMIT in asked.stderr
    assert not (tmp_path / "venv").exists()


def test_the_script_pins_the_commit_of_a_hub_model(first: Run) -> None:
    lineage = first.read(LINEAGE)
    base = {**lineage["base"], "from": "hub", "name": "org/tiny", "commit": COMMIT}
    text = reproduce_script({**lineage, "base": base}, first.read("environment.json"), "runs/x")
    assert f"snapshot_download('org/tiny', revision='{COMMIT}'" in text and f" model.revision={COMMIT}" in text
    assert text.index("make_environment;") < text.index("check_inputs;"), "the base is fetched with what is installed"
    demo = {**base, "from": "demo", "name": "demo", "commit": None}
    text = reproduce_script({**lineage, "base": demo}, first.read("environment.json"), "runs/x")
    assert "demo_model()" in text and "model.revision" not in text


# --- the tree of runs ---


def test_runs_are_listed_below_their_parents(first: Run, whole: Run, child: Run, place: Path) -> None:
    (place / "recipe.yaml").write_text("model: demo\n")  # a recipe that lies about is no run
    done = CliRunner().invoke(app, ["runs", "-C", str(place)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    above = next(at for at, line in enumerate(lines) if line.startswith(str(whole.path)))
    assert lines[above + 1].startswith(f"└ {child.path}")
    listed = {Path(item["run"]).name: item for item in json.loads(_json("runs", "--root", str(place), "--json"))}
    assert listed["child"]["parents"] == [str(whole.path)] and listed["first"]["parents"] == []
    assert listed["first"]["state"] == "done" and place.name not in listed


def test_a_damaged_run_and_runs_that_are_each_others_parents_are_listed(first: Run, tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one"), ("bad", "one")):
        copy = shutil.copytree(first.path, tmp_path / name)
        lineage = json.loads((copy / LINEAGE).read_text())
        lineage["parents"] = [{"how": "base", "run": f"../{other}", "recipe_sha256": "0"}]
        (copy / LINEAGE).write_text(json.dumps(lineage))
    (tmp_path / "bad" / "recipe.yaml").write_text("model: [")
    found = {Path(item["run"]).name: item["state"] for item in json.loads(_json("runs", "-C", str(tmp_path), "--json"))}
    assert found == {"one": "done", "two": "done", "bad": "damaged"}
    assert "no runs in nowhere" in CliRunner().invoke(app, ["runs", "-C", "nowhere"]).stdout


def _json(*arguments: str) -> str:
    return CliRunner().invoke(app, list(arguments)).stdout
