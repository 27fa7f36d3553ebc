"""Jobs that start from a run or an adapter: where they start is where that one ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import build_model, build_tokenizer, colour_rows, write_jsonl
from past_runs import past_run, recipe_for
from tunesmith.base import InputError
from tunesmith.methods.adapted import without_adapter
from tunesmith.pipeline.lineage import read_lineage
from tunesmith.pipeline.loaded import compare_with_base, load
from tunesmith.pipeline.locating import locate, run_recipe
from tunesmith.pipeline.merging import merge_run
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.rerun import plan_rerun
from tunesmith.pipeline.verifying import verify_run
from tunesmith.run import BASE_EVALUATION, TUNED_EVALUATION, Run

PROMPT = torch.tensor([[1, 40, 41, 42, 90, 17, 5]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def first(tiny_model: Path, place: Path) -> Run:
    return past_run(tiny_model, place, train={"steps": 6})


@pytest.fixture(scope="module")
def second(first: Run, place: Path) -> Run:
    return past_run(first.path, place, "second", train={"steps": 3})


def rows_of(run: Run, name: str) -> list[dict[str, Any]]:
    return run.read(name)["rows"]


def assert_starts_where_that_ended(run: Run, before: Run) -> None:
    found, expected = rows_of(run, BASE_EVALUATION), rows_of(before, TUNED_EVALUATION)
    assert [row["answer"] for row in found] == [row["answer"] for row in expected]
    assert [row["nll"] for row in found] == pytest.approx([row["nll"] for row in expected], rel=1e-4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.float()


def test_a_job_over_a_run_starts_where_that_one_ended(first: Run, second: Run) -> None:
    assert_starts_where_that_ended(second, first)
    begun = rows_of(first, BASE_EVALUATION)[0]["nll"]
    assert rows_of(second, BASE_EVALUATION)[0]["nll"] != pytest.approx(begun, rel=1e-3), "the raw base is elsewhere"


def test_the_reference_of_a_job_is_the_model_as_it_began(first: Run, second: Run, tiny_model: Path) -> None:
    model = load(second.path, dtype="fp32")
    with without_adapter(model):
        reference = logits(model)
    assert torch.allclose(reference, logits(load(first.path, dtype="fp32")), atol=1e-4)
    assert not torch.allclose(reference, logits(load(tiny_model, dtype="fp32")), atol=1e-2), "never the raw base"


def test_peft_loads_the_second_adapter_over_the_base_that_it_names(second: Run) -> None:
    from peft import PeftModel

    named = json.loads((second.path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute() and Path(named).name == "merged-fp32"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), second.path / "adapter").eval()
    assert torch.allclose(logits(theirs), logits(load(second.path, dtype="fp32")), atol=1e-4)


def test_what_comes_after_knows_both_adapters(second: Run, place: Path, tiny_model: Path) -> None:
    [result] = compare_with_base(str(second.path), [recipe_for(tiny_model, place).data], run_recipe(second).evaluate)  # pyright: ignore[reportArgumentType]
    assert result["metrics"]
    merge_run(str(second.path), place / "merged", dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32).eval()
    assert torch.allclose(logits(whole), logits(load(second.path, dtype="fp32")), atol=1e-4)


def test_lineage_names_the_parent_and_every_hash_holds(first: Run, second: Run) -> None:
    lineage = read_lineage(second)
    assert lineage is not None
    assert [(parent["how"], parent["run"]) for parent in lineage["parents"]] == [("base", "../first")]
    assert {part.state for part in [*verify_run(first), *verify_run(second)]} == {"ok"}


def test_runs_that_are_moved_together_find_each_other(first: Run, second: Run, tmp_path: Path) -> None:
    for run in (first, second):
        shutil.copytree(run.path, tmp_path / run.path.name)
    moved = tmp_path / "second"
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(recipe.replace(str(first.path), "/gone"))
    assert locate(str(moved)).base == str(tmp_path / "first" / "merged-fp32")
    shutil.rmtree(tmp_path / "first" / "merged-fp32")
    with pytest.raises(InputError, match="started from is gone"):
        locate(str(moved))


def test_the_plan_says_it_before_anything_is_written(first: Run, place: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(first.path, tmp_path / "copy", ignore=shutil.ignore_patterns("merged-*")))
    plan = plan_job(recipe_for(run.path, place, "planned")).plan
    told = {item.name: item for item in plan.resolved}["model.path"]
    assert told.value == str(run.path / "merged-fp32") and "merged once into a copy of its base" in told.reason
    assert not (run.path / "merged-fp32").exists()


def test_full_tuning_starts_from_an_adapter_and_an_adapter_from_full_tuning(
    first: Run, tiny_model: Path, place: Path
) -> None:
    full = past_run(first.path, place, "full", method="full", train={"learning_rate": 1e-3})
    assert_starts_where_that_ended(full, first)
    again = past_run(full.path, place, "over full")
    assert_starts_where_that_ended(again, full)
    assert locate(str(again.path)).base == str(full.path / "model"), "a whole model is not copied"


def test_dora_is_merged_too(tiny_model: Path, place: Path) -> None:
    dora = past_run(tiny_model, place, "dora", method={"kind": "lora", "dora": True})
    assert_starts_where_that_ended(past_run(dora.path, place, "over dora"), dora)


def test_added_tokens_are_those_of_the_next_job_too(tiny_model: Path, place: Path) -> None:
    trained = past_run(
        tiny_model,
        place,
        "tokens",
        model={"path": str(tiny_model), "add_tokens": ["<colour>"]},
        method={"kind": "lora", "trainable_tokens": "added"},
    )
    after = past_run(trained.path, place, "over tokens")
    assert_starts_where_that_ended(after, trained)
    counted = plan_job(run_recipe(after)).plan.parameters
    assert after.read("plan.json")["parameters"] == counted.model_dump()
    model = load(after.path, dtype="fp32")
    assert sum(parameter.numel() for parameter in model.parameters()) == counted.total


def test_an_adapter_of_peft_is_trained_on(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    run = past_run(tmp_path / "theirs", place, "over theirs")
    merged = tmp_path / "theirs" / "merged-fp32"
    assert locate(str(run.path)).base == str(merged)
    found = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert torch.allclose(logits(found), logits(theirs.eval()), atol=1e-4)
    weights = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="has changed since it was merged here"):
        past_run(tmp_path / "theirs", place, "over another")
    assert not (place / "over another").exists()


def test_a_quantized_base_is_said_to_be_started_from_nearly(first: Run, place: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = past_run(first.path, place, "quantized", method={"kind": "qlora", "rank": 4})
    assert any("starts close to where that one ended" in note for note in run.read("plan.json")["notes"])


def test_a_head_goes_on_too_and_a_model_that_writes_can_learn_to_judge(
    first: Run, tiny_model: Path, place: Path, tmp_path: Path
) -> None:
    rows = [{"text": row["prompt"], "label": "yes" if at % 3 else "no"} for at, row in enumerate(colour_rows(36))]
    judging = {
        "data": {"train": str(write_jsonl(tmp_path / "labels.jsonl", rows)), "test": 0.3},
        "objective": "classify",
        "evaluate": {"max_new_tokens": "auto", "forgetting": "auto"},
        "train": {"learning_rate": 0.005, "steps": 6},
    }
    over_writer = past_run(first.path, place, "judge", **judging)
    assert locate(str(over_writer.path)).base == str(first.path / "merged-fp32")
    again = past_run(over_writer.path, place, "judge again", **judging)
    found, expected = rows_of(again, BASE_EVALUATION), rows_of(over_writer, TUNED_EVALUATION)
    assert [row["answer"] for row in found] == [row["answer"] for row in expected]
    assert [row["nll"] for row in found] == pytest.approx([row["nll"] for row in expected], rel=1e-4)


def test_raw_text_on_a_base_without_a_template_then_answers(place: Path, tmp_path: Path) -> None:
    base = build_model(tmp_path / "base")
    build_tokenizer(base, chat_template=None)
    text = write_jsonl(
        tmp_path / "text.jsonl", [{"text": f"{row['prompt']} {row['completion']}"} for row in colour_rows(40)]
    )
    read = past_run(base, place, "read", data={"train": str(text), "test": 0.2})
    answers = past_run(read.path, place, "answers", data={"template": "chatml"})
    assert Path(locate(str(answers.path)).base) == read.path / "merged-fp32"
    assert json.loads((read.path / "merged-fp32" / "merge.json").read_text())["passed"]


def test_rerun_starts_from_the_same(first: Run, second: Run) -> None:
    assert plan_rerun(second.path).recipe.model.path == str(first.path)


@pytest.mark.parametrize("method", [{"kind": "prompt", "tokens": 2}, {"kind": "prefix", "tokens": 2}, "adapter"])
def test_what_cannot_be_merged_is_refused_by_the_plan(method: Any, tiny_model: Path, place: Path) -> None:
    kind = method if isinstance(method, str) else method["kind"]
    run = past_run(tiny_model, place, f"a {kind}", method=method)
    with pytest.raises(InputError, match="cannot be trained on top of"):
        plan_job(recipe_for(run.path, place, "over it"))


def test_other_wrong_starts_are_refused(first: Run, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a revision is of a model of the hub"):
        plan_job(recipe_for(first.path, place, "x", model={"path": str(first.path), "revision": "main"}))
    with pytest.raises(InputError, match="merged into its base first"):
        plan_job(recipe_for(first.path, place, "x", budget={"memory": "1GB"}))
    unfinished = shutil.copytree(first.path, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(InputError, match="no trained result yet"):
        plan_job(recipe_for(unfinished, place, "x"))
    copied = shutil.copytree(first.path, tmp_path / "copied", ignore=shutil.ignore_patterns("merged-*"))
    (copied / "merged-fp32").mkdir()
    with pytest.raises(InputError, match="not what Tunesmith merged"):
        past_run(copied, place, "x")


def test_a_full_disk_is_told_before_anything_is_merged(
    first: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(first.path, tmp_path / "copied", ignore=shutil.ignore_patterns("merged-*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # pyright: ignore
    with pytest.raises(InputError, match="when they are merged, and the disk has"):
        past_run(copied, place, "x")


def test_another_architecture_of_the_base_is_no_start(place: Path, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    run = past_run(model, place, "orphan")
    shutil.rmtree(model)
    with pytest.raises(InputError, match="no such model directory"):
        plan_job(recipe_for(run.path, place, "x"))
