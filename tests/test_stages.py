"""Recipes with stages: how they are read, where each stage starts, and that nothing is lost when one ends early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conftest import colour_rows, write_jsonl
from test_starting import assert_starts_where_that_ended
from tunesmith.base import InputError, Interrupted
from tunesmith.cli.app import app
from tunesmith.pipeline.chain import CHAIN, Chain
from tunesmith.pipeline.finetune import Watcher
from tunesmith.pipeline.lineage import read_lineage
from tunesmith.pipeline.locating import locate
from tunesmith.pipeline.stages import finetune_stages, plan_stages
from tunesmith.recipe_stages import StagedRecipe, read_job
from tunesmith.run import BASE_EVALUATION, REPORT, TUNED_EVALUATION, Run, find_runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    write_jsonl(root / "rows.jsonl", colour_rows(48))
    write_jsonl(root / "more.jsonl", colour_rows(48, 100))
    write_jsonl(root / "held-out.jsonl", colour_rows(12, 300))
    return root


def values_of(place: Path, model: Path, output: str = "chain") -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"train": str(place / "rows.jsonl"), "test": str(place / "held-out.jsonl")},
        "method": {"kind": "lora", "rank": 4},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32", "checkpoint_every": 2},
        "evaluate": {"max_new_tokens": 4, "resamples": 50, "forgetting": "off"},
        "output": str(place / output),
        "stages": {
            "sft": None,
            "more": {"model": "stages.sft", "data": {"train": str(place / "more.jsonl")}, "train": {"steps": 6}},
        },
    }


def written(directory: Path, values: Any, name: str = "recipe.yaml") -> Path:
    path = directory / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return path


def staged(directory: Path, values: Any, *overrides: str) -> StagedRecipe:
    recipe = read_job(written(directory, values), overrides)
    assert isinstance(recipe, StagedRecipe)
    return recipe


@pytest.fixture(scope="module")
def chain(tiny_model: Path, place: Path) -> Chain:
    return finetune_stages(staged(place, values_of(place, tiny_model)))


def results(chain: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(chain)): path.read_bytes()
        for path in chain.rglob("adapter_model.safetensors")
        if "checkpoints" not in path.parts
    }


# Reading.


def test_a_stage_is_laid_over_what_stands_above(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    values = values_of(place, tiny_model)
    values["gate"] = {"f1": 0.1}
    values["stages"]["whole"] = {"model": {"path": "demo"}, "method": {"kind": "full"}, "gate": {}, "seed": 3}
    values["stages"]["wider"] = {"method": {"rank": 8}, "evaluate": False, "gate": {}}
    sft, more, whole, wider = staged(tmp_path, values).stages
    assert sft.recipe.model.path == str(tiny_model) and sft.recipe.gate == {"f1": 0.1}
    assert (more.recipe.train.steps, more.recipe.train.batch_size) == (6, 4)
    assert more.recipe.data.test == str(place / "held-out.jsonl")
    assert (more.starts_from, more.uses, more.directory) == ("sft", ("sft",), "stages/02-more")
    assert whole.recipe.method.kind == "full" and whole.recipe.gate == {} and whole.recipe.seed == 3
    assert wider.recipe.method.kind == "lora" and wider.recipe.method.rank == 8
    assert wider.recipe.evaluate == "off" and not wider.names_model


def test_what_is_stored_is_the_same_recipe(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    recipe = staged(tmp_path, values_of(place, tiny_model))
    again = staged(tmp_path, recipe.yaml())
    assert again.yaml() == recipe.yaml() and again.output == recipe.output
    stored = [stage.recipe.model_copy(update={"output": ""}) for stage in again.stages]
    assert stored == [stage.recipe.model_copy(update={"output": ""}) for stage in recipe.stages]


def test_the_directory_takes_the_name_of_the_file(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    values = values_of(place, tiny_model)
    del values["output"]
    recipe = staged(tmp_path, values)
    assert recipe.output == "runs/recipe"
    first, second = (recipe.recipe_of(stage) for stage in recipe.stages)
    assert first.output == str(Path("runs/recipe/stages/01-sft"))
    assert second.model.path == first.output


def test_settings_of_the_command_line_reach_all_stages_or_one(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    values = values_of(place, tiny_model)
    recipe = staged(tmp_path, values, "train.batch_size=2", "stages.more.train.steps=9", "stages.more.model.dtype=fp32")
    first, second = (stage.recipe for stage in recipe.stages)
    assert first.train.batch_size == second.train.batch_size == 2
    assert (first.train.steps, second.train.steps) == (4, 9)
    assert (second.model.path, second.model.dtype) == ("stages.sft", "fp32")


def test_a_reference_may_stand_anywhere_but_in_data(place: Path, tmp_path: Path, tiny_model: Path) -> None:
    values = values_of(place, tiny_model)
    values["data"]["system"] = "stages.sft"
    values["stages"]["more"]["evaluate"] = {"forgetting": "stages.sft"}  # any text outside of data stands for a result
    recipe = staged(tmp_path, values)
    resolved = recipe.recipe_of(recipe.stages[1])
    assert resolved.data.system == "stages.sft"
    assert resolved.evaluate != "off" and resolved.evaluate.forgetting == str(place / "chain" / "stages" / "01-sft")


WRONG = {
    "a typo": ("stages: {sft: {}, dpo: {model: stages.stf}}", 3, "there is no stage 'stf'; did you mean 'sft'"),
    "a later stage": ("stages:\n  sft: {model: stages.dpo}\n  dpo: {}", 4, "stage 'dpo' comes later"),
    "a cycle": ("stages:\n  a: {model: stages.b}\n  b: {model: stages.a}", 4, "stage a: stage 'b' comes later"),
    "itself": ("stages:\n  a: {}\n  b:\n    model: stages.b", 6, "a stage cannot start from its own result"),
    "an unknown key": ("stages:\n  sft:\n    trian: {}", 5, "stage sft: unknown key 'trian'; did you mean 'train'"),
    "a wrong value": ("stages:\n  sft:\n    train:\n      steps: 0", 6, "stage sft: .*greater than 0"),
    "a contradiction": ("stages:\n  sft:\n    gate: {f1: 0}\n    evaluate: off", 5, "a gate needs an evaluation"),
    "no names": ("stages: [{}]", 3, "stages are a mapping of names to settings"),
    "none": ("stages: {}", 3, "stages are a mapping of names to settings"),
    "a name that is no directory": ("stages: {SFT: {}}", 3, "'SFT' is no name for a stage"),
    "no settings": ("stages: {sft: full}", 3, "stage sft: should be settings"),
    "an output of its own": ("stages: {sft: {output: x}}", 3, "'output' stands at the top level only"),
    "stages inside": ("stages: {sft: {stages: {}}}", 3, "'stages' stands at the top level only"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_file_and_the_line(case: tuple[str, int, str], tmp_path: Path) -> None:
    text, line, message = case
    path = written(tmp_path, f"model: demo\ndata: {{train: rows.jsonl}}\n{text}\n")
    with pytest.raises(InputError, match=message) as raised:
        read_job(path)
    assert str(raised.value.where).startswith(f"{path}:{line}")


def test_what_is_missing_is_missed_at_the_stage(tmp_path: Path) -> None:
    path = written(tmp_path, "stages:\n  sft: {model: demo, data: {train: x.jsonl}}\n  dpo: {model: stages.sft}\n")
    with pytest.raises(InputError, match="stage dpo: this key is missing") as raised:
        read_job(path)
    assert raised.value.where == f"{path}:3 data"


def test_commands_for_one_job_say_so(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    from tunesmith.recipe_file import read_recipe

    path = written(tmp_path, values_of(place, tiny_model))
    with pytest.raises(InputError, match="this recipe has stages"):
        read_recipe(path)


# Running.


def test_the_second_stage_starts_where_the_first_one_ended(chain: Chain) -> None:
    first, second = (stage.run for stage in chain.stages)
    assert_starts_where_that_ended(second, first)
    before, after = (run.read(name)["rows"] for run, name in ((first, BASE_EVALUATION), (first, TUNED_EVALUATION)))
    assert [row["nll"] for row in before] != pytest.approx([row["nll"] for row in after], rel=1e-3)


def test_every_stage_is_a_whole_run_and_the_directory_tells_of_all(chain: Chain) -> None:
    assert [stage.run.path.name for stage in chain.stages] == ["01-sft", "02-more"]
    assert all(stage.run.report is not None for stage in chain.stages)
    report = json.loads((chain.path / REPORT).read_text())
    assert [stage["state"] for stage in report["stages"]] == ["done", "done"] and report["stopped"] is None
    assert report["verdict"] == report["stages"][-1]["verdict"]
    page = (chain.path / "report.html").read_text()
    assert "All 2 stages are done" in page and 'href="stages/01-sft/report.html"' in page
    lineage = read_lineage(chain.stages[1].run)
    assert lineage is not None and [parent["run"] for parent in lineage["parents"]] == ["../01-sft"]
    assert lineage["base"]["within"] == "merged-fp32"


def test_a_chain_stands_for_the_result_of_its_last_stage(chain: Chain, tmp_path: Path) -> None:
    assert locate(str(chain.path)).adapter == chain.stages[-1].run.path / "adapter"
    shorter = Path(shutil.copytree(chain.path, tmp_path / "copy"))
    shutil.rmtree(shorter / "stages" / "02-more")
    with pytest.raises(InputError, match="the last stage, more, has no result yet") as raised:
        locate(str(shorter))
    assert str(shorter / "stages" / "01-sft") in str(raised.value.fix)
    (shorter / CHAIN).write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        locate(str(shorter))


def test_full_tuning_then_lora_copies_no_base(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    values = values_of(place, tiny_model, "full")
    values["stages"]["sft"] = {"method": "full", "train": {"learning_rate": 1e-3}}
    done = finetune_stages(staged(tmp_path, values))
    first, second = (stage.run for stage in done.stages)
    assert_starts_where_that_ended(second, first)
    assert locate(str(second.path)).base == str(first.path / "model")
    assert not list(done.path.rglob("merged-*"))


@pytest.fixture(scope="module")
def documented(tiny_model: Path, place: Path) -> Callable[[str], dict[str, Any]]:
    """The recipe of docs/stages.md that has a stage of this name, with a tiny model, few rows and few steps."""
    rows = colour_rows(24)
    files = {
        "answers": rows,
        "prompts": [{"prompt": row["prompt"]} for row in rows],
        "manuals": [{"text": f"{row['prompt']} means {row['completion']}"} for row in rows],
        "pairs": [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["prompt"][4:]} for r in rows],
    }
    for name, given in files.items():
        write_jsonl(place / f"{name}.jsonl", given)

    def recipe(stage: str) -> dict[str, Any]:
        blocks = (ROOT / "docs" / "stages.md").read_text().split("```yaml\n")[1:]
        [values] = [found for block in blocks if stage in (found := yaml.safe_load(block.split("```")[0]))["stages"]]
        values |= {"model": str(tiny_model), "output": str(place / stage)}
        values["evaluate"] = "off"
        for settings in values["stages"].values():
            settings["data"] = {**settings["data"], "train": str(place / settings["data"]["train"])}
            settings["train"] = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, "dtype": "fp32"}
            if "max_new_tokens" in settings.get("objective", {}):
                settings["objective"]["max_new_tokens"] = 5
        return values

    return recipe


def test_text_then_answers_then_preferences(documented: Any, tmp_path: Path) -> None:
    done = finetune_stages(staged(tmp_path, documented("dpo")))
    pretrain, sft, dpo = (stage.run for stage in done.stages)
    assert locate(str(sft.path)).base == str(pretrain.path / "merged-fp32")
    steps = [event for event in dpo.events() if event["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=2e-3), "log 2: policy and reference are one at the start"
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert locate(str(dpo.path)).base == str(sft.path / "merged-fp32")


def test_answers_then_a_judge_then_rewards(documented: Any, tmp_path: Path) -> None:
    """PPO starts from `sft` and not from the stage before it; stopped in the middle, it comes to the same bytes."""
    recipe = staged(tmp_path, documented("ppo"))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "rollout":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finetune_stages(recipe, watcher=Watcher(event=stop))
    done = finetune_stages(recipe, resume=True)
    sft, reward, ppo = (stage.run for stage in done.stages)
    assert locate(str(ppo.path)).base == locate(str(reward.path)).base == str(sft.path / "merged-fp32")
    notes = [event["message"] for event in ppo.events() if event["event"] == "note"]
    assert any(
        "weights of the reward model are those of the trained model's base, and are held once" in n for n in notes
    )
    assert next(event for event in ppo.events() if event["event"] == "rollout")["kl"] == pytest.approx(0, abs=1e-5)
    before = results(done.path)
    shutil.rmtree(ppo.path)
    assert results(finetune_stages(recipe, resume=True).path) == before


def test_the_same_recipe_makes_the_same_bytes_and_a_chain_is_never_overwritten(
    chain: Chain, tiny_model: Path, place: Path, tmp_path: Path
) -> None:
    again = staged(tmp_path, (chain.path / "recipe.yaml").read_text(), f"output={tmp_path / 'again'}")
    assert results(finetune_stages(again).path) == results(chain.path)
    with pytest.raises(InputError, match="never overwritten"):
        finetune_stages(again)
    before = (tmp_path / "again" / CHAIN).stat().st_mtime_ns
    finetune_stages(again, resume=True)
    assert (tmp_path / "again" / CHAIN).stat().st_mtime_ns == before


KILLED = """
import json, os, signal, sys
from tunesmith.pipeline.finetune import Watcher
from tunesmith.pipeline.stages import finetune_stages
from tunesmith.recipe_stages import read_job
stage = [0]
def announce(number, _):
    stage[0] = number
    if sys.argv[2] == "between" and number == 2: os.kill(os.getpid(), signal.SIGKILL)
def kill(event):
    if stage[0] == 2 and event.get("event") == "step" and event["step"] == 5: os.kill(os.getpid(), signal.SIGKILL)
finetune_stages(read_job(sys.argv[1]), watcher=Watcher(event=kill), announce=announce)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("when", ["between", "within"])
def test_a_killed_chain_goes_on_to_the_same_bytes(
    when: str, chain: Chain, tiny_model: Path, place: Path, tmp_path: Path
) -> None:
    recipe = staged(tmp_path, {**values_of(place, tiny_model), "output": str(tmp_path / "killed")})
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), when]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    states = [stage["state"] for stage in Chain.open(tmp_path / "killed").report()["stages"]]
    assert states == ["done", "waiting" if when == "between" else "unfinished"]
    begun: list[int] = []
    steps: list[int] = []
    watcher = Watcher(event=lambda event: steps.append(event["step"]) if event["event"] == "step" else None)
    finetune_stages(recipe, resume=True, watcher=watcher, announce=lambda number, stage: begun.append(number))
    assert begun == [1, 2] and steps[0] == (1 if when == "between" else 5)
    assert results(tmp_path / "killed") == results(chain.path)


def test_several_processes_go_through_all_stages(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    path = written(tmp_path, {**values_of(place, tiny_model), "output": str(tmp_path / "two")})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tunesmith"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*launch, "train", str(path)], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    first, second = (stage.run for stage in Chain.open(tmp_path / "two").stages)
    assert_starts_where_that_ended(second, first)


def test_a_stop_within_a_stage_is_gone_on_from(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    recipe = staged(tmp_path, values_of(place, tiny_model, "stopped"))

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        finetune_stages(recipe, watcher=Watcher(event=stop))
    assert Chain.open(place / "stopped").summary()["state"] == "interrupted, 0 of 2 stages"
    changed = staged(tmp_path, values_of(place, tiny_model, "stopped"), "stages.more.train.steps=5")
    with pytest.raises(InputError, match=r"stages\.more\.train\.steps is 5 now and was 6"):
        finetune_stages(changed, resume=True)
    renamed = values_of(place, tiny_model, "stopped")
    renamed["stages"]["last"] = {}
    with pytest.raises(InputError, match="the stages are sft, more, last now and were sft, more"):
        finetune_stages(staged(tmp_path, renamed), resume=True)
    done = finetune_stages(changed, resume=True, forced=["stages.more.train.steps"])
    assert done.stages[1].run.summary()["steps"] == 5
    assert "steps: 5" in (done.path / "recipe.yaml").read_text()
    late = staged(tmp_path, values_of(place, tiny_model, "stopped"), "train.batch_size=2", "stages.more.train.steps=5")
    with pytest.raises(InputError, match=r"stage sft is done, and its train\.batch_size can no longer change"):
        finetune_stages(late, resume=True, forced=["train.batch_size"])


def test_a_gate_ends_the_chain(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    values = values_of(place, tiny_model, "gated")
    values["stages"]["sft"] = {"gate": {"exact_match": 0.99}}
    path = written(tmp_path, values)
    ran = CliRunner().invoke(app, ["train", str(path)])
    assert ran.exit_code == 3
    assert "stage sft did not pass its gate: the stages after it were not run" in ran.stdout
    report = Chain.open(place / "gated").report()
    assert report["stopped"] == "sft" and [stage["state"] for stage in report["stages"]] == ["done", "waiting"]
    assert "were not run" in (place / "gated" / "report.html").read_text()
    again = CliRunner().invoke(app, ["train", str(path), "--resume", "--json"])
    assert again.exit_code == 3 and json.loads(again.stdout.splitlines()[-1])["stopped"] == "sft"


def test_what_is_wrong_with_the_last_stage_is_told_before_the_first_one(
    tiny_model: Path, place: Path, tmp_path: Path
) -> None:
    values = values_of(place, tiny_model, "early")
    values["stages"]["more"]["data"]["train"] = str(place / "nowhere.jsonl")
    with pytest.raises(InputError, match="stage more: ") as raised:
        finetune_stages(staged(tmp_path, values))
    assert "nowhere.jsonl" in str(raised.value)
    assert not (place / "early").exists()


def test_a_chain_that_ends_before_its_first_run_leaves_nothing(
    tiny_model: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **settings: Any) -> Run:
        raise InputError("no")

    monkeypatch.setattr("tunesmith.pipeline.stages.finetune", refused)
    with pytest.raises(InputError, match="no"):
        finetune_stages(staged(tmp_path, values_of(place, tiny_model, "none")))
    assert not (place / "none").exists()


def test_an_occupied_directory_is_refused(chain: Chain, tiny_model: Path, place: Path, tmp_path: Path) -> None:
    values = values_of(place, tiny_model)
    values["output"] = str(chain.stages[0].run.path)
    with pytest.raises(InputError, match="holds a run of one job"):
        finetune_stages(staged(tmp_path, values), resume=True)


# Looking.


def test_plans_of_later_stages_come_from_the_first_base(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    values = values_of(place, tiny_model, "planned")
    values["stages"]["fresh"] = {"train": {"steps": 2}}
    values["stages"]["late"] = {"model": "stages.more", "evaluate": {"forgetting": "stages.fresh"}}
    first, second, fresh, late = plan_stages(staged(tmp_path, values))
    assert first.plan is not None and first.notes == ()
    assert second.plan is not None and second.plan.steps == 6
    assert second.plan.parameters == first.plan.parameters
    assert second.notes == (f"stage sft is not trained yet: planned from {tiny_model}, which it comes from",)
    assert fresh.notes == (f"starts from {tiny_model}, not from the stage before it: it names no model",)
    assert late.plan is None and late.notes == ("planned when stage fresh is done, which it uses",)
    assert not (place / "planned").exists()


def test_plans_of_a_chain_that_is_done_come_from_its_results(chain: Chain, tiny_model: Path, place: Path) -> None:
    _, second = plan_stages(staged(place, values_of(place, tiny_model)))
    assert second.notes == () and second.plan is not None
    assert second.plan.parameters.model_dump() == chain.stages[1].run.read("plan.json")["parameters"]


def test_commands_know_stages(chain: Chain, tiny_model: Path, place: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = str(written(tmp_path, values_of(place, tiny_model, "looked at")))
    plan = run(app, ["plan", path])
    assert "stage 1 of 2: sft" in plan.stdout and "stage 2 of 2: more (sft, from stages.sft)" in plan.stdout
    plans = json.loads(run(app, ["plan", path, "--json"]).stdout)["stages"]
    assert [item["name"] for item in plans] == ["sft", "more"] and plans[1]["plan"]["steps"] == 6
    check = run(app, ["data", "check", "--recipe", path])
    assert check.exit_code == 0 and check.stdout.index("stage sft") < check.stdout.index("stage more")
    lines = run(app, ["data", "check", "--recipe", path, "--json"]).stdout.splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["sft", "more"]
    assert isinstance(run(app, ["data", "check", "--recipe", path, "--fix", "x.jsonl"]).exception, InputError)
    assert "Say" in run(app, ["data", "show", path, "--stage", "more"]).stdout
    for arguments, message in ((["--stage", "mroe"], "no stage 'mroe'"), ([], "name one with --stage: sft, more")):
        assert message in str(run(app, ["data", "show", path, *arguments]).exception)
    single = {name: value for name, value in values_of(place, tiny_model).items() if name != "stages"}
    alone = str(written(tmp_path, single, "single.yaml"))
    assert "has no stages" in str(run(app, ["data", "show", alone, "--stage", "sft"]).exception)


def test_lists_show_a_chain_with_its_stages_below(chain: Chain, place: Path) -> None:
    shown = CliRunner().invoke(app, ["runs", "--root", str(chain.path)]).stdout.splitlines()
    assert "sft → more" in shown[1]
    assert shown[2].startswith("└ ") and "01-sft" in shown[2]
    assert shown[3].startswith("  └ ") and "02-more" in shown[3]
    assert chain.path in {run.path for run in find_runs(place)}
    verified = CliRunner().invoke(app, ["runs", "verify", str(chain.path)])
    assert verified.exit_code == 0 and "01-sft" in verified.stdout and "02-more" in verified.stdout
    again = CliRunner().invoke(app, ["rerun", str(chain.path)])
    assert isinstance(again.exception, InputError) and "several runs" in str(again.exception)
