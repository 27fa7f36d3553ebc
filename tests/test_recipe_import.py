"""Files of axolotl and LLaMA-Factory become recipes that train as those files would, and no key is passed over."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.base import InputError, Source
from tunesmith.data.read import Reading, RecordStream
from tunesmith.data.record import Record, RowErrors
from tunesmith.data.rows import RowStream
from tunesmith.methods import Full, Lora
from tunesmith.models.templates import NAMED_TEMPLATES
from tunesmith.recipe_file import read_recipe
from tunesmith.recipe_import import LOUD, Imported, ImportedKey, import_recipe, migration_table
from tunesmith.recipe_import.axolotl_data import TEMPLATES as AXOLOTL_TEMPLATES
from tunesmith.recipe_import.convert import TABLES
from tunesmith.recipe_import.llamafactory_data import TEMPLATES as LLAMAFACTORY_TEMPLATES

PAGE = Path(__file__).parent.parent / "docs" / "import.md"

SUPPORT_BOT = """\
# a support assistant, one 24 GB card
base_model: acme/base-3b
model_revision: v2
load_in_4bit: true
adapter: qlora
lora_r: 64
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules:
peft_use_dora: true
peft_use_rslora: true

datasets:
  - path: tickets.jsonl
    ds_type: json
    type: chat_template
    field_messages: thread
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant]
    train_on_eos: turn
    colour: blue
chat_template: chatml
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
train_on_inputs: false

micro_batch_size: 2
gradient_accumulation_steps: 6
num_epochs: 4
max_steps: 900
learning_rate: 1e-4
optimizer: paged_adamw_8bit
lr_scheduler: linear
warmup_steps: 25
weight_decay: 0.01
max_grad_norm: 0.5
bf16: auto
tf32: true
gradient_checkpointing: true
flash_attention: true

eval_steps: 50
save_steps: 100
save_total_limit: 3
early_stopping_patience: 5
special_tokens:
  pad_token: "<|pad|>"
  eos_token: "<|done|>"
wandb_project: support
wandb_entity:
deepspeed: zero2.json
fsdp_config:
  offload: {params: false}
output_dir: ./out/support
seed: 7
"""

MANUALS = """\
base_model: ./models/base
datasets:
  - path: notes.jsonl
    type:
      field_instruction: input
      field_output: reply
      format: "Q: {instruction}\\nA:"
      no_input_format: "Q: {instruction}\\nA:"
  - path: json
    data_files: [a.jsonl, b.jsonl]
    type:
      field_instruction: ask
      field_output: reply
      format: "Q: {instruction}\\nA:"
      no_input_format: "Q: {instruction}\\nA:"
test_datasets:
  - path: held.jsonl
    split: train
    type:
      field_instruction: input
      field_output: reply
      format: "Q: {instruction}\\nA:"
      no_input_format: "Q: {instruction}\\nA:"
adapter:
learning_rate: 0.00002
excess_length_strategy: truncate
lr_scheduler: constant
warmup_ratio: 0.1
bf16: false
fp16: true
dataset_exact_deduplication: true
eval_strategy: no
save_strategy: "no"
"""

RECEPTION = """\
### model
model_name_or_path: acme/chat-8b
quantization_bit: 4
quantization_method: bnb
double_quantization: true
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 32
lora_target: q_proj,v_proj
additional_target: embed_tokens,lm_head
use_rslora: false
use_dora: true

### dataset
dataset: calls, forms
eval_dataset: calls_judged
dataset_dir: tables
template: llama3
cutoff_len: 1024
max_samples: 5000
mask_history: true
overwrite_cache: true
preprocessing_num_workers: 8

### output
output_dir: saves/reception
logging_steps: 10
save_steps: 250
plot_loss: true
overwrite_output_dir: true
report_to: [wandb, swanlab]

### train
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2
max_steps: 700
lr_scheduler_type: cosine_with_min_lr
warmup_ratio: 0.1
bf16: true
neat_packing: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
eval_strategy: steps
eval_steps: 125
per_device_eval_batch_size: 1
load_best_model_at_end: true
early_stopping_steps: 4
"""

RECEPTION_TABLE = {
    "calls": {
        "file_name": "calls.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "persona"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    },
    "forms": {"hf_hub_url": "acme/forms", "columns": {"prompt": "ask", "query": "form", "response": "filled"}},
    "calls_judged": {
        "file_name": "calls_judged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "persona"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True},
}

NOVELS = """\
model_name_or_path: acme/base-1b
stage: pt
finetuning_type: full
dataset: novels
num_train_epochs: 1.0
"""


def imported(folder: Path, text: str, name: str = "theirs.yml") -> Imported:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    result = import_recipe(file)
    check(result, text)
    return result


def check(result: Imported, text: str) -> None:
    """What holds for every file: each key once, and the YAML is the recipe, without contradictions."""
    names = dotted(yaml.load(text, yaml.BaseLoader))  # noqa: S506 - it makes texts of everything, and nothing else
    assert sorted(key.key for key in result.keys) == sorted(names)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "recipe.yaml"
        written.write_text(result.yaml, encoding="utf-8")
        read = read_recipe(written)
    assert read.model_copy(update={"output": result.recipe.output}) == result.recipe
    lines = text.splitlines()
    for key in result.keys:
        assert key.outcome != "translated" or key.to or key.note, key
        if key.key.rpartition(".")[2].isidentifier() and not text.startswith("{"):
            assert key.key.rpartition(".")[2] in lines[key.line - 1], key
    for key in result.changes:
        assert f"{key.line} {' '.join(key.key.split())}:" in result.yaml


def dotted(value: Any, prefix: str = "") -> list[str]:
    """Keys of nested mappings, independently of how the importer walks."""
    if isinstance(value, dict):
        return [name for k, v in value.items() for name in (f"{prefix}{k}", *dotted(v, f"{prefix}{k}."))]
    if isinstance(value, list):
        return [name for index, item in enumerate(value) for name in dotted(item, f"{prefix}{index}.")]
    return []


def of(result: Imported, key: str) -> ImportedKey:
    return next(item for item in result.keys if item.key == key)


def test_axolotl_qlora_on_conversations(tmp_path: Path) -> None:
    result = imported(tmp_path, SUPPORT_BOT)
    recipe = result.recipe
    assert result.source == "axolotl"
    assert recipe.model.model_dump() == {
        "path": "acme/base-3b",
        "revision": "v2",
        "dtype": "auto",
        "quantize": "nf4",
        "double_quantization": True,
        "add_tokens": [],
    }
    assert recipe.method == Lora(rank=64, alpha=16, dropout=0.05, targets="all-linear", rslora=True)
    data = recipe.data
    assert (data.train, data.format, data.columns) == ("tickets.jsonl", "sharegpt", {"conversations": "thread"})
    assert (data.template, data.validation, data.max_length, data.overlong) == ("chatml", 0.05, 4096, "drop")
    assert (data.train_on, data.duplicates) == ("answers", "keep")
    train = recipe.train
    assert (train.batch_size, train.micro_batch, train.epochs, train.steps) == (12, 2, 4, 900)
    assert (train.learning_rate, train.schedule, train.warmup) == (1e-4, "linear", 25)
    assert (train.weight_decay, train.clip, train.optimizer) == (0.01, 0.5, "adamw-8bit")
    assert (train.dtype, train.packing, train.gradient_checkpointing) == ("auto", True, True)
    assert (train.evaluate_every, train.checkpoint_every, train.keep) == (50, 100, 3)
    assert train.early_stopping != "off" and train.early_stopping.patience == 5
    assert train.best == "validation-loss"
    assert (train.log, recipe.output, recipe.seed) == (["wandb"], "./out/support", 7)


def test_axolotl_says_what_it_cannot_carry_over(tmp_path: Path) -> None:
    result = imported(tmp_path, SUPPORT_BOT)
    loud = {key.key for key in result.changes}
    assert loud == {"peft_use_dora", "sample_packing", "special_tokens.eos_token"}
    dora = of(result, "peft_use_dora")
    assert (dora.outcome, dora.line) == ("no counterpart", 11)
    assert of(result, "micro_batch_size").note.count("one process") == 1
    assert of(result, "learning_rate").outcome == "taken"
    assert of(result, "flash_attention").outcome == "ignored"
    assert of(result, "lora_target_modules").outcome == "ignored"
    assert of(result, "datasets.0.colour").outcome == "no counterpart"
    assert of(result, "fsdp_config.offload.params").note == "part of `fsdp_config`"
    assert not of(result, "deepspeed").note.startswith(LOUD)


def test_axolotl_full_fine_tuning_on_its_own_layout(tmp_path: Path) -> None:
    result = imported(tmp_path, MANUALS)
    recipe = result.recipe
    assert recipe.method == Full()
    sources = [item if isinstance(item, str) else (item.path, item.format) for item in recipe.data.train]
    assert sources == [(name, "prompt-completion") for name in ("notes.jsonl", "a.jsonl", "b.jsonl")]
    assert recipe.data.columns == {"prompt": "Q: {input}\nA:", "completion": "reply"}
    assert (recipe.data.validation, recipe.data.overlap, recipe.data.template) == ("held.jsonl", "keep", "plain")
    assert (recipe.data.max_length, recipe.data.overlong, recipe.data.duplicates) == (512, "truncate", "drop")
    train = recipe.train
    assert (train.epochs, train.batch_size, train.micro_batch) == (1, 1, "auto")
    assert (train.schedule, train.warmup, train.dtype) == ("constant", 0, "fp16")
    assert (train.evaluate_every, train.checkpoint_every, train.best) == ("off", "off", "last")
    record = Record({"input": "Why?", "reply": "Because."}, Source("notes.jsonl", 1))
    reading = Reading("notes.jsonl", format=recipe.data.format, columns=recipe.data.columns)
    [row] = RowStream(RecordStream([record]), reading, RowErrors())
    assert [turn["content"] for turn in row.messages] == ["Q: Why?\nA:", "Because."]


def test_llamafactory_looks_data_sets_up(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "dataset_info.json").write_text(json.dumps(RECEPTION_TABLE), encoding="utf-8")
    result = imported(tmp_path, RECEPTION)
    recipe = result.recipe
    assert result.source == "llamafactory"
    assert recipe.model.quantize == "nf4"
    whole = ["embed_tokens", "lm_head"]
    assert recipe.method == Lora(rank=32, alpha=64, targets=["q_proj", "v_proj"], modules_to_save=whole)
    calls, forms = recipe.data.train
    turns = {"conversations": "turns", "system": "persona"}
    assert not isinstance(calls, str) and not isinstance(forms, str)
    assert (calls.path, calls.format, calls.columns) == (str(tmp_path / "tables" / "calls.json"), "sharegpt", turns)
    assert (forms.path, forms.format) == ("acme/forms", "alpaca")
    assert forms.columns == {"instruction": "ask", "input": "form", "output": "filled"}
    assert recipe.data.validation == str(tmp_path / "tables" / "calls_judged.json")
    assert (recipe.data.format, recipe.data.columns) == ("sharegpt", turns)
    assert (recipe.data.template, recipe.data.train_on) == ("llama-3", "last-answer")
    assert (recipe.data.max_length, recipe.data.overlong) == (1023, "truncate")
    train = recipe.train
    assert (train.batch_size, train.micro_batch, train.steps, train.epochs) == (32, 4, 700, None)
    assert (train.schedule, train.warmup, train.dtype, train.packing) == ("cosine", 0.1, "bf16", True)
    assert (train.evaluate_every, train.checkpoint_every, train.best) == (125, 250, "validation-loss")
    assert train.early_stopping != "off" and train.early_stopping.patience == 4
    assert train.log == ["wandb"]
    assert {key.key for key in result.changes} == {
        *("use_dora", "max_samples", "lr_scheduler_type", "neat_packing", "dataset")
    }


def test_llamafactory_defaults_are_written_out(tmp_path: Path) -> None:
    result = imported(tmp_path, NOVELS)
    recipe = result.recipe
    assert recipe.method == Full()
    assert (recipe.data.train, recipe.data.format, recipe.data.max_length) == ("novels", "text", 2048)
    assert recipe.objective.kind == "pretrain"
    train = recipe.train
    assert (train.batch_size, train.learning_rate, train.schedule, train.warmup) == (8, 5e-5, "linear", 0)
    assert (train.epochs, recipe.seed) == (1, 42)
    written = {line.split(":")[0] for line in result.defaults}
    assert {"train.batch_size", "train.learning_rate", "train.schedule", "train.warmup", "seed", "data.test"} <= written
    assert {"data.max_length", "data.duplicates", "objective.kind", "train.dtype"} <= written
    apart = imported(tmp_path, NOVELS + "packing: false\n").recipe
    assert (apart.objective.kind, apart.data.template, apart.data.overlong) == ("sft", "plain", "truncate")
    assert "data/dataset_info.json" in of(result, "dataset").note


def test_llamafactory_lora_defaults(tmp_path: Path) -> None:
    recipe = imported(tmp_path, "model_name_or_path: a/b\ndataset: x\n").recipe
    assert recipe.method == Lora(rank=8, alpha=16)
    assert recipe.train.epochs is None


def test_missing_file() -> None:
    with pytest.raises(InputError, match="no such file"):
        import_recipe("nowhere.yml")


def test_named_templates_exist() -> None:
    named = {*AXOLOTL_TEMPLATES.values(), *(name for name, _ in LLAMAFACTORY_TEMPLATES.values())}
    assert named <= {"auto", "plain", *NAMED_TEMPLATES}


@pytest.mark.parametrize("source", ["axolotl", "llamafactory"])
def test_no_key_stands_in_a_table_twice(source: Any) -> None:
    keys = [key for entry in TABLES[source][1] for key in entry.keys]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("source", ["axolotl", "llamafactory"])
def test_the_page_is_up_to_date(source: Any) -> None:
    table = migration_table(source)
    assert table in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{table}"
