"""One error that names the key, the line, what was found and what to do: for everything that can stand in a recipe."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.base import InputError
from tunesmith.recipe import Recipe
from tunesmith.recipe_file import check_recipe, parse_yaml, read_recipe, recipe_yaml

HEAD = "model: m\ndata: {train: t.jsonl}\n"
WITH_VALIDATION = "model: m\ndata: {train: t.jsonl, validation: 0.1}\n"


def read(tmp_path: Path, text: str | bytes, *overrides: str, name: str = "recipe.yaml") -> Recipe:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_recipe(path, overrides)


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, *overrides)
    error = caught.value
    assert error.where and error.fix, "every error says where it is and what to do"
    assert "pydantic" not in str(error) and "instance of" not in str(error)
    return error


def place(tmp_path: Path, line: int | None, key: str) -> str:
    return f"{tmp_path / 'recipe.yaml'}{'' if line is None else f':{line}'} {key}".rstrip()


UNKNOWN = {
    "trian: {}": ("trian", "train"),
    "train: {epoch: 3}": ("train.epoch", "epochs"),
    "train: {early_stopping: {patient: 3}}": ("train.early_stopping.patient", "patience"),
    "model: {path: m, quant: nf4}": ("model.quant", "quantize"),
    "data: {train: t, colums: {}}": ("data.colums", "columns"),
    "data: {train: [{path: a, wieght: 2}]}": ("data.train.0.wieght", "weight"),
    "data: {train: [a, {path: a, fromat: text}]}": ("data.train.1.fromat", "format"),
    "method: {kind: lora, rnk: 3}": ("method.rnk", "rank"),
    "method: {rnk: 3}": ("method.rnk", "rank"),
    "method: {kind: full, rank: 3}": ("method.rank", None),
    "objective: {kind: sft, knd: 1}": ("objective.knd", "kind"),
    "evaluate: {row: 3}": ("evaluate.row", "rows"),
    "1: x": ("1", None),
    "null: x": ("None", None),
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_an_unknown_key_at_any_level(line: str, tmp_path: Path) -> None:
    key, nearest = UNKNOWN[line]
    section = line.partition(":")[0]
    rest = [part for part in HEAD.splitlines() if not part.startswith(f"{section}:")]
    error = refusal(tmp_path, "\n".join([*rest, line]))
    assert error.what == f"unknown key {key.split('.')[-1]!r}" + (f"; did you mean {nearest!r}?" if nearest else "")
    assert error.where == place(tmp_path, len(rest) + 1 if line != "null: x" else None, key)
    assert error.fix and error.fix.startswith("known keys here: ")


def test_the_line_is_that_of_the_key_in_a_long_recipe(tmp_path: Path) -> None:
    text = "# a comment\n\nmodel:\n  path: m\ndata:\n  train:\n    - path: a\n      weight: 1\n"
    text += "    - path: b\n      weigth: 2\n"
    assert refusal(tmp_path, text).where == place(tmp_path, 10, "data.train.1.weigth")
    assert refusal(tmp_path, text.replace("\n", "\r\n")).where == place(tmp_path, 10, "data.train.1.weigth")


WRONG = {
    "train: {steps: many}": ("train.steps", "should be a whole number, found 'many'"),
    "train: {steps: 1.5}": ("train.steps", "should be a whole number, found 1.5"),
    "train: {steps: 0}": ("train.steps", "should be greater than 0, found 0"),
    "train: {steps: true}": ("train.steps", "should be a number, found yes, on or true"),
    "train: {batch_size: yes}": ("train.batch_size", "should be a number, found yes, on or true"),
    "train: {weight_decay: off}": ("train.weight_decay", "should be a number, found no, off or false"),
    "train: {learning_rate: fast}": ("train.learning_rate", "should be a number or 'auto', found 'fast'"),
    "train: {learning_rate: .inf}": ("train.learning_rate", "should be a number, found inf"),
    "train: {learning_rate: .nan}": ("train.learning_rate", "should be greater than 0 or 'auto', found nan"),
    "train: {packing: maybe}": ("train.packing", "should be true or false or 'auto', found 'maybe'"),
    "train: {schedule: cosin}": ("train.schedule", "found 'cosin'; did you mean 'cosine'?"),
    "train: {clip: none}": ("train.clip", "should be a number or 'off', found 'none'"),
    "train: {log: tensorboard}": ("train.log", "should be a list, `[…]`, found 'tensorboard'"),
    "train: {log: [tensorbord]}": ("train.log.0", "did you mean 'tensorboard'?"),
    "train: {early_stopping: yes}": ("train.early_stopping", "should be settings, one `key: value` a line or 'off'"),
    "train: {early_stopping: {patience: 0}}": ("train.early_stopping.patience", "should be greater than 0, found 0"),
    "train:": ("train", "should be settings, one `key: value` a line, found nothing"),
    "method: lroa": ("method", "unknown kind 'lroa'; did you mean 'lora'?"),
    "method: [lora]": ("method", "should be settings"),
    "method:": ("method", "should be settings, one `key: value` a line, found nothing"),
    "method: {rank: x}": ("method.rank", "should be a whole number, found 'x'"),
    "method: {targets: 5}": ("method.targets", "should be text or a list, `[…]`, found 5"),
    "objective: nothing": ("objective", "unknown kind 'nothing'"),
    "evaluate: fast": ("evaluate", "should be settings, one `key: value` a line or 'off', found 'fast'"),
    "evaluate: {confidence: 95}": ("evaluate.confidence", "should be less than 1, found 95"),
    "evaluate: {metrics: [rougel]}": ("evaluate.metrics.0", "unknown metric 'rougel'; did you mean 'rougeL'?"),
    "evaluate: {metrics: rougeL}": ("evaluate.metrics", "should be a list, `[…]` or 'auto', found 'rougeL'"),
    "gate: {rougeL: lots}": ("gate.rougeL", "'lots' is not a number or a percentage"),
    "gate: {rougeL: true}": ("gate.rougeL", "a threshold is a number"),
    "gate: {rougeL: .nan}": ("gate.rougeL", "should be a number, found nan"),
    "gate: {rougeL: inf%}": ("gate.rougeL", "should be a number, found inf%"),
    "gate: {rougel: 0.1}": ("gate.rougel", "unknown metric 'rougel'; did you mean 'rougeL'?"),
    "gate: [rougeL]": ("gate", "should be a mapping"),
    "output: 2024-01-01": ("output", "should be text, found datetime.date(2024, 1, 1)"),
    "output: runs/{nme}": ("output", "unknown placeholder {nme}"),
    "output: ''": ("output", "the path is empty"),
    "seed: -1": ("seed", "should be greater than or equal to 0, found -1"),
    "seed: true": ("seed", "should be a number, found yes, on or true"),
    "model: 5": ("model", "should be settings, one `key: value` a line, found 5"),
    "model: {path: m, dtype: float32}": ("model.dtype", "found 'float32'"),
    "data: t.jsonl": ("data", "should be settings, one `key: value` a line, found 't.jsonl'"),
    "data: {train: 5}": ("data.train", "should be text or a list, `[…]`, found 5"),
    "data: {train: {path: a}}": ("data.train", "should be text or a list, `[…]`, found {'path': 'a'}"),
    "data: {train: [a, 5]}": ("data.train.1", "should be text or settings, one `key: value` a line, found 5"),
    "data: {train: [a, {weight: 5}]}": ("data.train.1.path", "this key is missing"),
    "data: {train: [{path: a, weight: 0}]}": ("data.train.0.weight", "should be greater than 0, found 0"),
    "data: {train: [{path: a, weight: .inf}]}": ("data.train.0.weight", "should be a number, found inf"),
    "data: {train: t, format: alpcaa}": ("data.format", "did you mean 'alpaca'?"),
    "data: {train: t, columns: prompt}": ("data.columns", "should be a mapping, `{name: value, …}`, found 'prompt'"),
    "data: {train: t, columns: {prompt: 5}}": ("data.columns.prompt", "should be text, found 5"),
    "data: {train: t, max_length: 0}": ("data.max_length", "should be greater than 0 or 'auto', found 0"),
    "data: {train: t, test: 2}": ("data.test", "2 is not a fraction between 0 and 1"),
    "data: {train: t, test: off}": ("data.test", "a path or a fraction such as 0.1 is needed"),
    "data: {train: t, validation: 1.0}": ("data.validation", "1 is not a fraction between 0 and 1"),
    "data: {train: t, validation: yes}": ("data.validation", "a path or a fraction such as 0.1 is needed"),
    "data: {train: t, answer_after: ''}": ("data.answer_after", "at least 1 character"),
    "data: {}": ("data.train", "this key is missing"),
    "data:": ("data", "found nothing"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_value(line: str, tmp_path: Path) -> None:
    key, what = WRONG[line]
    section = line.partition(":")[0]
    rest = [part for part in WITH_VALIDATION.splitlines() if not part.startswith(f"{section}:")]
    error = refusal(tmp_path, "\n".join([*rest, line]))
    assert what in error.what
    assert error.where == place(tmp_path, len(rest) + 1, key)


def test_missing_sections_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, "data: {train: t}").where == place(tmp_path, None, "model")
    error = refusal(tmp_path, "model: m")
    assert error.where == place(tmp_path, None, "data") and error.what == "this key is missing"


CONTRADICTIONS = {
    HEAD + "train: {early_stopping: {patience: 3}}": ("train.early_stopping", "needs validation rows"),
    HEAD + "train: {evaluate_every: 5}": ("train.evaluate_every", "needs validation rows"),
    HEAD + "train: {generate_every: 5}": ("train.generate_every", "needs validation rows"),
    WITH_VALIDATION + "train: {evaluate_every: off, early_stopping: {}}": ("train.early_stopping", "needs evaluations"),
    HEAD + "train: {micro_batch: 32, batch_size: 16}": ("train.micro_batch", "32 is larger than the batch of 16"),
    HEAD + "evaluate: off\ngate: {rougeL: 0.1}": ("gate", "a gate needs an evaluation"),
    HEAD + "evaluate: {forgetting: off}\ngate: {forgetting: 5%}": ("gate.forgetting", "is not measured"),
    "model: {path: m, quantize: nf4}\ndata: {train: t}\nmethod: full": ("model.quantize", "cannot be trained whole"),
}


@pytest.mark.parametrize("text", CONTRADICTIONS)
def test_settings_that_contradict_each_other(text: str, tmp_path: Path) -> None:
    key, what = CONTRADICTIONS[text]
    error = refusal(tmp_path, text)
    assert what in error.what and (error.where or "").endswith(f" {key}")
    lines = text.splitlines()
    section = key.split(".")[0]
    assert error.where == place(tmp_path, next(n for n, at in enumerate(lines, 1) if at.startswith(section)), key)


def test_short_forms(tmp_path: Path) -> None:
    short = read(
        tmp_path, HEAD + "method: full\nobjective: sft\nevaluate: off\ntrain: {clip: off, early_stopping: off}"
    )
    assert short.model.path == "m" and short.method.kind == "full" and short.objective.kind == "sft"
    assert short.evaluate == "off" and short.train.clip == "off" and short.train.early_stopping == "off"
    quoted = read(tmp_path, HEAD + "evaluate: 'off'\ntrain: {clip: 'off'}")
    assert quoted.evaluate == "off" and quoted.train.clip == "off"
    assert read(tmp_path, HEAD + "method: {rank: 3}").method.model_dump()["rank"] == 3
    assert read(tmp_path, "model: m\ndata: {train: t, validation: off}").data.validation is None
    forgetting = read(tmp_path, HEAD + "evaluate: {forgetting: off}").evaluate
    assert forgetting != "off" and forgetting.forgetting == "off"


def test_numbers_as_yaml_1_1_reads_them(tmp_path: Path) -> None:
    """PyYAML takes 2e-4, which has no point, for text."""
    assert isinstance(yaml.safe_load("2e-4"), str)
    recipe = read(tmp_path, HEAD + "train: {learning_rate: 2e-4, warmup: 1e-1, epochs: 1e0}")
    assert (recipe.train.learning_rate, recipe.train.warmup, recipe.train.epochs) == (2e-4, 0.1, 1.0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("+0.02", 0.02), ("0.02", 0.02), ("5%", 0.05), ("+5 %", 0.05), ("-1%", -0.01), ("'3'", 3.0), ("1e-2", 0.01)],
)
def test_thresholds_of_a_gate(written: str, meant: float, tmp_path: Path) -> None:
    gate = read(tmp_path, HEAD + f"gate: {{rougeL: {written}, forgetting: {written}}}").gate
    assert gate == {"rougeL": pytest.approx(meant), "forgetting": pytest.approx(meant)}


def test_output_takes_the_name_of_the_recipe(tmp_path: Path) -> None:
    assert read(tmp_path, HEAD, name="my.first.yaml").output == "runs/my.first"
    assert read(tmp_path, HEAD + "output: out/{name}/a", name="sql.yml").output == "out/sql/a"
    assert read(tmp_path, HEAD, "output=here/{name}-2", name="sql.yml").output == "here/sql-2"


# --- overrides ---

BASE = "model: m\ndata: {train: [{path: a, weight: 1}, b]}\nmethod: lora\nevaluate: off\n"


def test_overrides_reach_every_setting(tmp_path: Path) -> None:
    def over(*overrides: str) -> dict[str, Any]:
        return read(tmp_path, BASE, *overrides).model_dump(mode="json")

    assert over("train.steps=7")["train"]["steps"] == 7
    assert over("train.steps=7", "train.steps=")["train"]["steps"] is None
    assert over("method.rank=8")["method"] == {**over()["method"], "rank": 8}
    assert over("method=full")["method"]["kind"] == "full"
    assert over("model.dtype=bf16")["model"] == {**over()["model"], "dtype": "bf16"}
    assert over("evaluate.rows=5")["evaluate"]["rows"] == 5
    assert over("evaluate={rows: 6}")["evaluate"]["rows"] == 6
    assert over("data.train.0.weight=3")["data"]["train"][0]["weight"] == 3
    assert over("data.train=x.jsonl")["data"]["train"] == "x.jsonl"
    assert over("data.columns.prompt=q")["data"]["columns"] == {"prompt": "q"}
    assert over("data.validation=0.1", "train.early_stopping.patience=2")["train"]["early_stopping"]["patience"] == 2
    assert over("gate.rougeL=5%", "evaluate={}")["gate"] == {"rougeL": 0.05}
    assert over("data.answer_after=Answer: ")["data"]["answer_after"] == "Answer: "
    assert over('data.answer_after="\\nA: "')["data"]["answer_after"] == "\nA: "
    assert over("output=a=b")["output"] == "a=b"


@pytest.mark.parametrize(
    ("override", "where", "what"),
    [
        ("train.steps=ten", "command line train.steps", "should be a whole number, found 'ten'"),
        ("train.stesp=3", "command line train.stesp", "did you mean 'steps'?"),
        ("trian.steps=3", "command line trian", "did you mean 'train'?"),
        ("method.rnk=3", "command line method.rnk", "did you mean 'rank'?"),
        ("data={train: x, colums: 1}", "command line data.colums", "did you mean 'columns'?"),
        ("data.train.5.weight=3", "command line data.train.5.weight", "there is no item 5"),
        ("data.train.x=3", "command line data.train.x", "there is no item x"),
        ("seed.x=3", "command line seed", "should be a whole number"),
        ("data.train.1.weight=3", "command line data.train.1.weight", "'1' holds a value, not settings"),
        ("train.steps", "command line", "is not key=value"),
        ("=3", "command line", "is not key=value"),
        ("train..steps=3", "command line", "is not key=value"),
        ("train.steps=[", "command line train.steps", "the value is not YAML"),
        ("gate.rougel=5%", "command line gate.rougel", "did you mean 'rougeL'?"),
    ],
)
def test_a_wrong_override_is_not_blamed_on_the_file(override: str, where: str, what: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, BASE.replace("evaluate: off\n", ""), override)
    assert error.where == where and what in error.what


# --- files that are no recipe ---

BROKEN: dict[str, tuple[int | None, str]] = {
    "": (None, "a recipe is a mapping"),
    "# only a comment\n": (None, "a recipe is a mapping"),
    "- model: m\n": (None, "a recipe is a mapping"),
    "hello": (None, "a recipe is a mapping"),
    "model: [m\ndata: {train: t}\n": (2, "not YAML"),
    "model: m\ndata:\n\ttrain: t\n": (3, "not YAML: found character '\\t'"),
    HEAD + "train: steps: 3\n": (3, "not YAML: mapping values are not allowed here"),
    HEAD + "---\n" + HEAD: (3, "not YAML"),
    "model: m\n\ndata: {train: t\x07}\n": (3, "not YAML: the character U+0007"),
    HEAD + "seed: !!python/object/apply:os.system [ls]\n": (3, "not YAML: could not determine a constructor"),
    HEAD + "? [a]\n: x\n": (3, "not YAML: found unhashable key"),
    HEAD + "seed: *nowhere\n": (3, "not YAML: found undefined alias"),
    HEAD + "seed: 2024-13-45\n": (None, "not YAML: month must be in 1..12"),
    HEAD + "output: " + "[" * 5000: (None, "not YAML: nested too deeply"),
    HEAD + "train: {steps: 1}\nseed: 1\ntrain: {steps: 2}\n": (5, "the key 'train' stands twice (first in line 3)"),
    "model: m\ndata:\n  train: t\n  'train': u\n": (4, "the key 'data.train' stands twice (first in line 3)"),
    "model: m\ndata: {train: [{path: a, path: b}]}": (2, "the key 'data.train.0.path' stands twice"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    line, what = BROKEN[text]
    error = refusal(tmp_path, text)
    assert error.what.startswith(what) and len(error.what.splitlines()) == 1
    assert error.where == place(tmp_path, line, "")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    error = refusal(tmp_path, "model: m\ndata: {train: é}\n".encode("latin-1"))
    assert error.what == "not UTF-8: byte 0xe9" and error.where == place(tmp_path, 2, "")
    assert read(tmp_path, b"\xef\xbb\xbf" + HEAD.encode()).model.path == "m"
    for path, what in ((tmp_path / "nowhere.yaml", "no such recipe"), (tmp_path, "the recipe cannot be read: ")):
        with pytest.raises(InputError, match=what) as caught:
            read_recipe(path)
        assert caught.value.where == str(path) and caught.value.fix


# --- anchors and aliases ---


def test_anchors_aliases_and_merges(tmp_path: Path) -> None:
    text = "model: &m some\ndata: {train: *m}\ntrain: &t {steps: 3, batch_size: 2}\n"
    recipe = read(tmp_path, text)
    assert recipe.data.train == "some" and recipe.train.steps == 3
    merged = read(tmp_path, HEAD + "train:\n  <<: {steps: 3, batch_size: 2}\n  steps: 4\n")
    assert (merged.train.steps, merged.train.batch_size) == (4, 2)
    error = refusal(tmp_path, text + "evaluate: *t\n")
    assert error.what.startswith("unknown key 'steps'") and error.where == place(tmp_path, 4, "evaluate.steps")


@pytest.mark.parametrize("text", ["model: &m [*m]\ndata: {train: t}", "model: m\ndata: &d {train: t, columns: *d}"])
def test_an_alias_of_itself_is_refused(text: str, tmp_path: Path) -> None:
    assert len(str(refusal(tmp_path, text))) < 1000


def test_aliases_that_multiply_do_not_take_for_ever(tmp_path: Path) -> None:
    names = "abcdefghijklmnop"
    layers = [f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]" for before, here in pairwise(names)]
    text = "\n".join(["a: &a [x, x]", *layers, HEAD])
    assert refusal(tmp_path, text).what.startswith("unknown key 'a'")
    nested = "[*a, *a]"
    for _ in range(3):
        nested = f"[{nested}, {nested}]"
    shown = refusal(tmp_path, HEAD + f"seed: [&a [{', '.join('x' * 500)}], {nested}]")
    assert shown.what.startswith("should be a whole number, found [[") and len(shown.what) < 500


# --- a recipe as it is stored ---


@pytest.mark.parametrize(
    "text",
    [
        HEAD,
        HEAD + "evaluate: off\ntrain: {clip: off, evaluate_every: off, checkpoint_every: off}\nmethod: full\n",
        HEAD + "gate: {rougeL: +2%, forgetting: 5%}\noutput: runs/é {x}\n".replace(" {x}", ""),
        "model: {path: m, quantize: nf4}\ndata:\n  train: [{path: a, weight: 0.5, columns: {prompt: 'A: {b}'}}, c]\n"
        "  answer_after: \"\\nA: \"\n  system: |\n    Be brief.\n    Be kind: 'yes'\n  validation: 0.1\n"
        "train: {early_stopping: {patience: 2}, learning_rate: 1e-5, log: [wandb]}\n",
    ],
)
def test_a_stored_recipe_reads_back_equal(text: str, tmp_path: Path) -> None:
    recipe = read(tmp_path, text)
    stored = recipe_yaml(recipe)
    again = read(tmp_path, stored, name="other.yaml")
    assert again == recipe and recipe_yaml(again) == stored
    assert set(yaml.safe_load(stored)) == set(Recipe.model_fields), "every setting is written out"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=4, max_size=4),
    number=st.floats(min_value=1e-300, max_value=1e300),
)
def test_any_text_and_number_reads_back_equal(texts: list[str], number: float) -> None:
    values = {
        "model": texts[0],
        "data": {"train": texts[1], "answer_after": texts[2], "system": texts[3], "columns": {"prompt": texts[0]}},
        "train": {"learning_rate": number},
        "gate": {"rougeL": number},
    }
    recipe = check_recipe(values, "test")
    read_back, _ = parse_yaml(recipe_yaml(recipe), "test")
    again = check_recipe(read_back, "test")
    assert again == recipe
    assert isinstance(again.train.learning_rate, float) and math.isclose(again.train.learning_rate, number)
