"""Single keys of axolotl and LLaMA-Factory, random files, and those that are refused with the place and the reason."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from test_recipe_import import RECEPTION_TABLE, imported, of
from tunesmith.base import InputError
from tunesmith.recipe_import import LOUD, import_recipe
from tunesmith.recipe_import.convert import TABLES


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("bf16: true", {"dtype": "bf16"}),
        ("bf16: full", {"dtype": "bf16"}),
        ("fp16: true", {"dtype": "fp16"}),
        ("bf16: false", {"dtype": "fp32"}),
        ("bf16: true\nfp16: true", {"dtype": "bf16"}),
        ("optimizer: adamw_torch", {"optimizer": "adamw"}),
        ("optimizer: adamw_bnb_8bit", {"optimizer": "adamw-8bit"}),
        ("optimizer: paged_adamw_32bit", {"optimizer": "adamw"}),
        ("optimizer: lion_8bit", {"optimizer": "adamw"}),
        ("lr_scheduler: constant_with_warmup\nwarmup_ratio: 0.2", {"schedule": "constant", "warmup": 0.2}),
        ("lr_scheduler: polynomial", {"schedule": "linear"}),
        ("lr_scheduler: rex", {"schedule": "cosine"}),
        ("warmup_ratio: 1", {"warmup": 0.9999}),
        ("warmup_steps: 0", {"warmup": 0}),
        ("max_grad_norm: 0", {"clip": "off"}),
        ("max_steps: 40\neval_steps: 0.25\nval_set_size: 0.1", {"evaluate_every": 10}),
        ("eval_steps: 0.25\nval_set_size: 0.1", {"evaluate_every": "auto", "best": "last"}),
        ("batch_size: 12\nmicro_batch_size: 3", {"batch_size": 12, "micro_batch": 3}),
        ("early_stopping_patience: 3", {"early_stopping": "off"}),
        ("use_tensorboard: true", {"log": ["tensorboard"]}),
        ("gradient_checkpointing: offload", {"gradient_checkpointing": True}),
        (
            "save_steps: 20\neval_steps: 10\nload_best_model_at_end: true\nval_set_size: 0.1",
            {"best": "validation-loss"},
        ),
        ("save_steps: 15\neval_steps: 10\nload_best_model_at_end: true\nval_set_size: 0.1", {"best": "last"}),
    ],
)
def test_axolotl_training_keys(tmp_path: Path, theirs: str, ours: dict[str, Any]) -> None:
    head = "base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: x.jsonl, type: chat_template}]\n"
    train = imported(tmp_path, head + theirs + "\n").recipe.train
    assert {key: getattr(train, key) for key in ours} == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("type: chat_template", ("messages", {})),
        ("type: chat_template, field_messages: turns", ("messages", {"messages": "turns"})),
        (
            "type: chat_template, field_messages: conversations, message_property_mappings: "
            "{role: from, content: value}",
            ("sharegpt", {}),
        ),
        (
            "type: chat_template, message_field_role: from, message_field_content: value",
            ("sharegpt", {"conversations": "messages"}),
        ),
        ("type: sharegpt", ("sharegpt", {})),
        ("type: 'sharegpt:chat'", ("sharegpt", {})),
        ("type: alpaca", ("alpaca", {})),
        ("type: alpaca_chat.load_qa", ("prompt-completion", {"prompt": "question", "completion": "answer"})),
        ("type: completion", ("text", {})),
        ("type: completion, field: body", ("text", {"text": "body"})),
        ("type: input_output", ("auto", {})),
        (
            "type: {field_instruction: q, field_input: c, field_output: a, format: '{instruction} {input}'}",
            ("prompt-completion", {"prompt": "{q} {c}", "completion": "a"}),
        ),
    ],
)
def test_axolotl_row_types(tmp_path: Path, theirs: str, ours: tuple[str, dict[str, str]]) -> None:
    text = f"base_model: a/b\nlearning_rate: 1e-4\ndatasets:\n  - {{path: x.jsonl, {theirs}}}\n"
    data = imported(tmp_path, text).recipe.data
    assert (data.format, data.columns) == ours


def test_a_split_that_cannot_be_read_never_becomes_validation(tmp_path: Path) -> None:
    text = "base_model: a/b\nlearning_rate: 1e-4\ndatasets: [{path: o/d, type: chat_template}]\n"
    result = imported(tmp_path, text + "test_datasets: [{path: o/d, split: test, type: chat_template}]\n")
    assert result.recipe.data.validation is None
    assert of(result, "test_datasets").note.startswith(LOUD)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("base_model: a\ndatasets: [{path: x}]\nrl: gdpo\n", ":3 rl", "'gdpo' is not available; dpo, ipo, kto"),
        ("base_model: a\ndatasets: [{path: x}]\nprocess_reward_model: true\n", ":3 process_", "not available"),
        ("base_model: a\ndatasets: [{path: x}]\nrl: grpo\n", ":3 rl", "in the section `trl`"),
        ("base_model: a\ndatasets: [{path: x}]\nrl: grpo\ntrl: {beta: 0}\n", "trl.reward_funcs", "names none"),
        (
            "base_model: a\ndatasets: [{path: x}]\nrl: grpo\ntrl: {reward_funcs: [score]}\n",
            ":4 trl.reward_funcs",
            "module.function is expected",
        ),
        (
            "base_model: a\ndatasets: [{path: x}]\nrl: grpo\ntrl: {reward_funcs: [a.b], reward_weights: [1, 2]}\n",
            ":4 trl.reward_weights",
            "a number for every function",
        ),
        ("base_model: a\ndatasets: [{path: x}]\nadapter: llama-adapter\n", ":3 adapter", "is not available"),
        ("base_model: a\nmicro_batch_size: 1\n", " datasets", "no data set is named"),
        ("base_model: a\ndatasets: []\n", ":2 datasets", "no data set is named"),
        ("base_model: a\ndatasets: [{type: alpaca}]\n", "datasets.0", "has no path"),
        ("base_model: a\ndatasets: [{path: x}]\nlearning_rate: fast\n", ":3 learning_rate", "a number is expected"),
        ("base_model: a\ndatasets: [{path: x}]\nadapter: lora\nlora_dropout: 1.5\n", ":4 lora_dropout", "less than 1"),
        ("base_model: a\ndatasets: [{path: x}]\nload_in_8bit: true\n", ":3 load_in_8bit", "cannot be trained whole"),
        ("datasets: [{path: x}]\nmicro_batch_size: 1\n", " base_model", "missing"),
        ("model_name_or_path: a\ndataset: x\nstage: dpp\n", ":3 stage", "'dpp' is not available; sft, pt, rm, dpo"),
        ("model_name_or_path: a\ndataset: x\nstage: dpo\npref_loss: bco\n", ":4 pref_loss", "sigmoid, ipo, hinge"),
        ("model_name_or_path: a\ndataset: x\nstage: ppo\n", ":3 stage", "names none"),
        (
            "model_name_or_path: a\ndataset: x\nstage: ppo\nreward_model: b\nreward_model_type: api\n",
            ":5 reward_model_type",
            "behind an address",
        ),
        ("model_name_or_path: a\ndataset: x\nfinetuning_type: freeze\n", ":3 finetuning_type", "not available"),
        ("model_name_or_path: a\nstage: sft\n", " dataset", "no data set is named"),
        ("model: a\ndata: {train: x}\n", "", "a recipe already"),
        ("base_modle: a\nlearning_rate: 1\n", "", "did you mean 'base_model'"),
        ("base_model: a\n  b: c\n", ":2", "not YAML"),
        ("base_model: a\nbase_model: b\n", ":2", "stands twice"),
        ("- base_model\n", "", "a mapping"),
        ("", "", "a mapping"),
        ("base_model: &x {y: *x}\n", "", "nests too deeply"),
        ("base_model: a\nseed: 2001-99-99\n", ":2", "cannot be read"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, text: str, where: str, what: str) -> None:
    file = tmp_path / "bad.yml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        import_recipe(file)
    assert what in str(caught.value)
    assert where in str(caught.value.where) and "bad.yml" in str(caught.value.where)


def test_bad_tables_of_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = tmp_path / "data" / "dataset_info.json"
    file = tmp_path / "theirs.yaml"
    for content, name, what in (
        ("{\n oops", "calls", "not JSON"),
        ("[]", "calls", "not a table"),
        (json.dumps(RECEPTION_TABLE), "call", "did you mean 'calls'"),
        (json.dumps(RECEPTION_TABLE), "pairs", "preference pairs"),
    ):
        table.write_text(content, encoding="utf-8")
        file.write_text(f"model_name_or_path: a\ndataset: {name}\n", encoding="utf-8")
        with pytest.raises(InputError, match=what):
            import_recipe(file)


BASES = {
    "axolotl": {"base_model": "a/b", "datasets": [{"path": "x.jsonl", "type": "chat_template"}]},
    "llamafactory": {"model_name_or_path": "a/b", "dataset": "x"},
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.floats(0, 2),
    st.sampled_from(["", "auto", "no", "1e-4", "lora", "alpaca", "steps", "epoch", "chatml", "~", "{x}", "data.jsonl"]),
)
NAMES = st.sampled_from(
    ["path", "type", "split", "role", "x", "1", "no", "null", "field_output", "chat_template", "a b"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)


def keys_of(source: Any, *, harmless: bool) -> list[str]:
    """A tool's keys, or only those whose values are not looked into, so that every file can be imported."""
    entries = TABLES[source][1]
    if harmless:
        entries = [entry for entry in entries if entry.meaning.startswith(("ignored: ", "no counterpart: "))]
    return [key for entry in entries for key in entry.keys]


@st.composite
def files(draw: st.DrawFn, *, harmless: bool) -> dict[str, Any]:
    """A file of either tool: its least content, some of its keys, and some keys of nobody."""
    source = draw(st.sampled_from(sorted(BASES)))
    names = st.sampled_from(keys_of(source, harmless=harmless)) | st.sampled_from(["colour", "a b", "no", "7", "Ü"])
    file = {**draw(st.dictionaries(names, VALUES, max_size=12)), **BASES[source]}
    return {key: file[key] for key in draw(st.permutations(sorted(file)))}


def text_of(file: dict[str, Any]) -> str:
    return yaml.safe_dump(file, sort_keys=False, allow_unicode=True)


@settings(max_examples=60, deadline=None)
@given(files(harmless=True))
def test_every_key_is_named_once(file: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        imported(Path(folder), text_of(file))


@settings(max_examples=60, deadline=None)
@given(files(harmless=False))
def test_any_value_is_imported_or_refused_by_name(file: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            imported(Path(folder), text_of(file))
        except InputError as error:
            assert "theirs.yml" in str(error.where)
