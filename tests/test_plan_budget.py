"""Budgets of memory, time and money, and the table of machines that they are looked for in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import build_model, colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.cli.app import app
from tunesmith.cli.plan import Asked, budget_of, show_plan
from tunesmith.pipeline.budgeting import Choice, refuse_beyond_budget, rented, table_of, within_budget
from tunesmith.pipeline.calibration import calibrated, copy_of
from tunesmith.pipeline.dry_step import dry_step
from tunesmith.pipeline.estimating import estimate_job
from tunesmith.pipeline.planning import plan_job
from tunesmith.plan import fit
from tunesmith.plan.duration import CALIBRATED
from tunesmith.plan.machines import read_machines
from tunesmith.plan.table import Table
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe
from tunesmith.recipe_limits import BudgetSpec
from tunesmith.resolved import Memory

LLAMA3_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    build_model(root / "model")
    write_jsonl(root / "rows.jsonl", colour_rows(24))
    (root / "8b").mkdir()
    (root / "8b" / "config.json").write_text(json.dumps(LLAMA3_8B), encoding="utf-8")
    return root


def recipe(place: Path, model: str = "model", **sections: Any) -> Recipe:
    values = {
        "model": str(place / model),
        "data": {"train": str(place / "rows.jsonl"), "test": 0.2},
        "train": {"steps": 3, "batch_size": 4},
        "evaluate": {"max_new_tokens": 4, "rows": 4, "forgetting": "off"},
        **sections,
    }
    return check_recipe(values, "test")


@pytest.fixture(scope="module")
def table(place: Path) -> Table:
    """What fits where for a model of 8B, of which only the configuration is there."""
    return table_of(recipe(place, "8b", data={"train": "nothing.jsonl", "max_length": 512}), read_machines())


def test_the_table_of_8b_is_what_is_known_of_these_cards(table: Table) -> None:
    fits = {(cell.machine, cell.variant): cell for cell in table.cells}
    assert not fits["RTX 4090", "lora bf16"].fits or fits["RTX 4090", "lora bf16"].rows < 8
    assert fits["RTX 4090", "qlora nf4"].fits and fits["A100 40GB", "lora bf16"].fits
    assert not any(fits[name, "full bf16"].fits for name in ("RTX 3080", "RTX 4090", "A100 80GB", "H100 80GB"))
    assert fits["8x A100 80GB", "full bf16"].fits and fits["8x H100 80GB", "full bf16"].fits
    assert fits["Apple M2 Max", "lora bf16"].fits
    one, eight = fits["H100 80GB", "lora bf16"], fits["8x H100 80GB", "lora bf16"]
    assert one.price is not None and one.hours is not None and eight.hours is not None
    assert eight.hours < one.hours / 6 and one.price == pytest.approx(one.hours * 2.69)
    assert table.hosted[0][0].startswith("Together, LoRA, up to 16B")
    assert json.loads(json.dumps(table.as_json()))["tokens"] == table.tokens


def test_money_buys_the_least_given_up_and_little_money_gives_up_more(place: Path, table: Table) -> None:
    anything = recipe(place, "8b")
    rich = rented(table, BudgetSpec(money=500), anything)
    assert rich.settings["method.kind"] == "full" and rich.machine.startswith("8x") and rich.settings["train.shard"]
    poor = rented(table, BudgetSpec(money=500, memory="24GB"), anything)
    assert poor.settings["method.kind"] in ("lora", "qlora") and poor.given_up
    with pytest.raises(InputError, match=r"nothing fits: the cheapest way is .* USD in .* h, the fastest"):
        rented(table, BudgetSpec(money=0.000001), anything)
    kept = rented(table, BudgetSpec(money=500), recipe(place, "8b", method="lora"))
    assert kept.settings["method.kind"] == "lora" and kept.given_up == []  # though money would buy more


def test_memory_and_time_choose_here_and_an_impossible_budget_says_what_it_takes(place: Path) -> None:
    machines = read_machines()
    assert within_budget(recipe(place), BudgetSpec(memory="8GB"), machines).settings["method.kind"] == "full"
    own = within_budget(recipe(place, method="lora"), BudgetSpec(memory="8GB", time="10h"), machines)
    assert own.given_up == [] and own.plan is not None and own.plan.parameters.trainable < own.plan.parameters.total
    with pytest.raises(InputError, match=r"needs \d+\.\d+ GB and the fastest") as error:
        within_budget(recipe(place), BudgetSpec(memory="50MB"), machines)
    assert error.value.fix is not None
    needed = re.search(r"memory=([\d.]+)GB", error.value.fix)
    assert needed is not None
    assert isinstance(within_budget(recipe(place), BudgetSpec(memory=f"{needed[1]}GB"), machines), Choice)
    assert "time=" not in error.value.fix and "True" not in str(error.value)


def test_a_budget_that_the_plan_itself_keeps_is_kept(place: Path) -> None:
    asked = recipe(place, method="lora")
    plan = plan_job(asked).plan
    budget = BudgetSpec(memory=plan.memory.peak_bytes + 10_000)
    choice = within_budget(asked, budget, read_machines())
    assert choice.plan is not None and choice.memory_bytes <= plan.memory.peak_bytes + 10_000


TOO_MUCH = 10**16
FITTING: dict[str, tuple[dict[tuple[int, bool], int], tuple[int, bool]]] = {
    "the whole batch": ({}, (4, False)),
    "more kernels for smaller ones": ({(1, False): TOO_MUCH, (2, False): TOO_MUCH}, (4, False)),
    "one row": ({(4, False): TOO_MUCH, (2, False): TOO_MUCH}, (1, False)),
    "only recomputed": ({(rows, False): TOO_MUCH for rows in (1, 2, 4)} | {(4, True): TOO_MUCH}, (2, True)),
    "nothing": (
        {(rows, again): TOO_MUCH * rows for rows in (1, 2, 4) for again in (False, True)} | {(2, True): TOO_MUCH // 2},
        (2, True),
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_the_fullest_micro_batch_that_fits(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, chosen = FITTING[name]
    nothing = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "runtime"), 0)
    monkeypatch.setattr(fit.Fit, "load", lambda self, recipe, rows, again: (rows, again))
    monkeypatch.setattr(
        fit, "predict_memory", lambda model, recipe, load: Memory(**nothing, peak_bytes=peaks.get(load, 1))
    )
    plan = plan_job(recipe(place, method="lora")).plan
    assert (plan.micro_batch, plan.gradient_checkpointing) == chosen
    assert any("the job is expected to need" in note for note in plan.notes) == (name == "nothing")


def test_tied_weights_are_counted_once_by_budgets_and_tables(tmp_path: Path) -> None:
    config = LLAMA3_8B | {"tie_word_embeddings": True, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    values = {"model": str(tmp_path), "data": {"train": "nothing.jsonl"}, "method": "lora"}
    planned = estimate_job(check_recipe(values, "test"))
    model = copy_of(planned, None)
    assert sum(weight.numel() for weight in model.parameters()) == sum(planned.plan.parameters.parts.values())


def test_training_refuses_to_start_beyond_a_budget_of_time_or_money(place: Path) -> None:
    plan = plan_job(recipe(place)).plan
    long = plan.model_copy(update={"time": plan.time.model_copy(update={"seconds": 7200.0})})
    for budget, where, what in (
        (BudgetSpec(time="1h"), "budget.time", "predicted to take 2.00 h, more than 1h"),
        (BudgetSpec(money=1), "budget.money", "nobody knows what this machine costs"),
        (BudgetSpec(money=1, hourly_price=2), "budget.money", "predicted to cost 4.00, more than 1"),
    ):
        with pytest.raises(InputError, match=what) as error:
            refuse_beyond_budget(recipe(place).model_copy(update={"budget": budget}), long)
        assert error.value.where == where
    refuse_beyond_budget(recipe(place, budget={"time": "3h", "money": 5, "hourly_price": 2}), long)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["memry=3"], "did you mean 'memory'"),
        (["memory"], "is no limit"),
        (["memory=much"], "not a size"),
        (["time=soon"], "not a time"),
        (["money=-1"], "money"),
    ],
)
def test_a_wrong_budget_is_named(given: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what) as error:
        budget_of(given)
    assert error.value.where == "--budget"


def test_times_are_read_and_an_idle_price_is_refused() -> None:
    assert [BudgetSpec(time=text).seconds for text in ("90s", "45min", "2h", "1d", 7)] == [90, 2700, 7200, 86400, 7]
    with pytest.raises(ValueError, match="hourly_price is for `money`"):
        BudgetSpec(hourly_price=1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("pric: 3}", "unknown key 'pric'; did you mean 'price'"),
        ("bandwidth: fast}", "valid number"),
        ("}", "this key is missing"),
    ],
)
def test_a_wrong_table_of_machines_is_named_by_line_and_key(place: Path, change: str, what: str) -> None:
    file = place / "machines.yaml"
    row = f"{{name: a, kind: cuda, memory: 8, tflops: 1, fp32: 1, {'' if change == '}' else 'bandwidth: 1, '}{change}"
    if "fast" in change:
        row = row.replace("bandwidth: 1, ", "")
    file.write_text(
        "date: 2026-01-01\ncurrency: EUR\nsource: mine\nefficiency: {cuda: 0.3, mps: 0.3, several: 0.9}\n"
        f"machines:\n  - {row}\nhosted: []\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError, match=what) as error:
        read_machines(file)
    assert error.value.where is not None and "machines.yaml:" in error.value.where
    with pytest.raises(InputError, match="cannot be read"):
        read_machines(place / "none.yaml")


def test_blocks_are_timed_and_a_dry_step_is_measured(place: Path) -> None:
    planned = plan_job(recipe(place))
    found = calibrated(planned).plan
    assert found.time.source == CALIBRATED and found.time.train_seconds > 0 and found.time.evaluate_seconds > 0
    assert found.model_copy(update={"time": planned.plan.time}) == planned.plan  # nothing else depends on it
    rowless = calibrated(estimate_job(recipe(place, "8b", data={"train": "nothing.jsonl"}))).plan
    assert "that needs rows and a tokenizer" in rowless.notes[-1] and "evaluation is not counted" in rowless.notes[-2]
    step = dry_step(planned)
    assert step.peak_bytes > 10**8 and step.tokens > 0 and step.stands_for is None


def test_the_verb_prints_table_and_proposal_and_refuses_two_questions(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_plan(recipe(place), Asked(table=True), as_json=False)
    printed = capsys.readouterr().out
    assert "RTX 3080" in printed and "qlora nf4" in printed and "through an API, USD" in printed
    show_plan(recipe(place), Asked(budget=("memory=8GB",)), as_json=True)
    assert {"given_up", "settings", "machine", "plan"} <= json.loads(capsys.readouterr().out).keys()
    with pytest.raises(InputError, match="--table and --probe are different questions"):
        show_plan(recipe(place), Asked(table=True, probe=True), as_json=False)
    with pytest.raises(InputError, match="a dry step needs rows"):
        show_plan(recipe(place, "8b", data={"train": "nothing.jsonl"}), Asked(probe=True), as_json=False)
    with pytest.raises(InputError, match="not made from timed blocks"):
        show_plan(recipe(place), Asked(table=True, calibrate=True), as_json=False)
    with pytest.raises(InputError, match="is for --table and --budget"):
        show_plan(recipe(place), Asked(machines=Path("mine.yaml")), as_json=False)
    assert "--table" in CliRunner().invoke(app, ["plan", "--help"]).output
