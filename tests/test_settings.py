"""Every setting takes effect: changing any field of the schema changes the plan or the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from conftest import build_model, colour_rows, write_jsonl
from task_rows import build_trunk, tag_rows
from tunesmith.base import InputError, TunesmithError
from tunesmith.data.spec import DataSpec, ReplaySpec, SourceSpec
from tunesmith.methods import Adapter, Full, HeadOnly, Ia3, Lora, Peft, Prefix, Prompt, QLora
from tunesmith.metrics.spec import PythonMetric, SqlMetric
from tunesmith.objectives import (
    Classify,
    Distill,
    Dpo,
    Grpo,
    Kto,
    Orpo,
    Policy,
    Ppo,
    Pretrain,
    Regress,
    Reward,
    Rloo,
    SimPo,
    Supervised,
    Tag,
)
from tunesmith.objectives.policy import RolloutServer
from tunesmith.objectives.rewards import (
    ExactReward,
    FunctionReward,
    JsonReward,
    ModelReward,
    NumberReward,
    RegexReward,
    RewardSpec,
)
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe import EarlyStopping, EvaluateSpec, GroupSpec, MemorisationSpec, ModelSpec, Recipe, TrainSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.recipe_limits import BudgetSpec

BASE: dict[str, Any] = {
    "data": {"validation": 0.2, "test": 0.2},
    "method": {"kind": "lora", "rank": 2},
    "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.05, "dtype": "fp32", "warmup": 1, "evaluate_every": 1},
    "evaluate": {"max_new_tokens": 4, "resamples": 20, "rows": 8, "forgetting": "off", "samples": 1},
}
MESSY = [
    *colour_rows(36),
    colour_rows(1)[0],
    {"prompt": "Say nothing 99", "completion": " "},
    {"prompt": "Say " + "very " * 40 + "long 100", "completion": "LONG very " * 8},
]
FULL, ADAPTER = {"method": {"kind": "full"}}, {"method": {"kind": "adapter"}}
PREFIX, PROMPT = ({"method": {"kind": kind, "tokens": 3}} for kind in ("prefix", "prompt"))
HEAD = {"method": {"kind": "head"}}
JUDGED = {"evaluate": {"max_new_tokens": "auto"}}


def judging(kind: str, rows: str, **settings: Any) -> dict[str, Any]:
    """A job whose model judges."""
    objective = {"objective": {"kind": kind, **settings}}
    return {**JUDGED, **objective, "model": {"path": "TRUNK"}, "data": {"train": rows}}


def preferring(kind: str, **settings: Any) -> dict[str, Any]:
    """A job over preferences."""
    rows = "UNPAIRED" if kind == "kto" else "PAIRS"
    return {**JUDGED, "objective": {"kind": kind, **settings}, "data": {"train": rows}}


DPO = preferring("dpo")
LABELS, NUMBERS, TAGS = judging("classify", "LABELS"), judging("regress", "NUMBERS"), judging("tag", "TAGS")
DOCUMENTS = {**JUDGED, "data": {"train": "TEXT"}, "objective": {"kind": "pretrain"}}
OWN = {"path": "self", "answers": 30, "max_new_tokens": 60}


def drawing(kind: str = "grpo", reward: Any = None, **settings: Any) -> dict[str, Any]:
    """A job that trains on its own answers."""
    reward = {"kind": "function", "path": "MINE"} if reward is None else reward
    sizes = {"group_size": 4, "max_new_tokens": 5} if kind != "ppo" else {"max_new_tokens": 5}
    return {"objective": {"kind": kind, "reward": reward, **sizes, **settings}}


def distilled(**settings: Any) -> dict[str, Any]:
    """A job that learns from a teacher."""
    return {"objective": {"kind": "distill", "teacher": "OTHER", **settings}}


LONG = {"data": {"train": "LONG"}, "evaluate": {"max_new_tokens": 12}}
CLEANING = {"empty": "drop", "overlong": "drop", "max_length": 40}

# For every field: the sections that it is changed in, beside which the same job with the default is run.
# A value that must be refused is marked so: a refusal is an effect too.
REFUSED = object()
CHANGES: dict[str, Any] = {
    "model.path": ({}, {"model": {"path": "OTHER"}}),
    "model.revision": None,
    "model.dtype": ({}, {"model": {"dtype": "bf16"}}),
    "model.quantize": ({}, {"model": {"quantize": "int8"}}),
    "model.add_tokens": (
        {"method": {"trainable_tokens": [5]}},
        {"model": {"add_tokens": ["<colour>"]}, "method": {"trainable_tokens": "added"}},
    ),
    "model.double_quantization": (
        {"model": {"quantize": "fp4"}},
        {"model": {"quantize": "fp4", "double_quantization": False}},
    ),
    "data.train": ({}, {"data": {"train": "MORE"}}),
    "data.validation": ({}, {"data": {"validation": 0.4}}),
    "data.test": ({}, {"data": {"test": 0.3}}),
    "data.format": ({}, {"data": {"format": "alpaca"}}),
    "data.columns": ({}, {"data": {"columns": {"prompt": "completion", "completion": "prompt"}}}),
    "data.answer_after": ({"data": {"train": "TEXT"}}, {"data": {"train": "TEXT", "answer_after": "A: "}}),
    "data.system": ({}, {"data": {"system": "Be brief."}}),
    "data.template": ({}, {"data": {"template": "plain"}}),
    "data.train_on": ({}, {"data": {"train_on": "everything"}}),
    "data.max_length": ({}, {"data": {"max_length": 50}}),
    "data.overlong": (
        {"data": {**CLEANING, "train": "MESSY"}},
        {"data": {**CLEANING, "train": "MESSY", "overlong": "truncate"}},
    ),
    "data.empty": ({"data": {"train": "MESSY"}}, {"data": {"train": "MESSY", "empty": "drop"}}),
    "data.duplicates": (
        {"data": {**CLEANING, "train": "MESSY"}},
        {"data": {**CLEANING, "train": "MESSY", "duplicates": "keep"}},
    ),
    "data.temperature": (
        {"data": {"train": ["ROWS", "MORE"]}},
        {"data": {"train": ["ROWS", "MORE"], "temperature": 5}},
    ),
    "data.replay": ({}, {"data": {"replay": {"path": "MORE"}}}),
    "data.replay.path": ({"data": {"replay": {"path": "MORE"}}}, {"data": {"replay": {"path": "TWIN"}}}),
    "data.replay.share": (
        {"data": {"replay": {"path": "MORE", "share": 0.2}}},
        {"data": {"replay": {"path": "MORE", "share": 0.4}}},
    ),
    "data.replay.format": (
        {"data": {"replay": {"path": "MORE"}}},
        {"data": {"replay": {"path": "MORE", "format": "alpaca"}}},
    ),
    "data.replay.columns": (
        {"data": {"replay": {"path": "MORE"}}},
        {"data": {"replay": {"path": "MORE", "columns": {"prompt": "completion", "completion": "prompt"}}}},
    ),
    "data.replay.subset": (
        {"data": {"replay": {"path": "MORE"}}},
        {"data": {"replay": {"path": "MORE", "subset": "x"}}},
    ),
    "data.replay.split": ({"data": {"replay": {"path": "MORE"}}}, {"data": {"replay": {"path": "MORE", "split": "x"}}}),
    "data.replay.prompts": ({"data": {"replay": OWN}}, {"data": {"replay": {**OWN, "prompts": "MORE"}}}),
    "data.replay.answers": ({"data": {"replay": OWN}}, {"data": {"replay": {**OWN, "answers": 20}}}),
    "data.replay.max_new_tokens": ({"data": {"replay": OWN}}, {"data": {"replay": {**OWN, "max_new_tokens": 30}}}),
    "data.replay.temperature": ({"data": {"replay": OWN}}, {"data": {"replay": {**OWN, "temperature": 0.5}}}),
    "data.split_seed": ({"data": {"test": 0.3}}, {"data": {"test": 0.3, "split_seed": 5}}),
    "data.stratify": ({"data": {"train": "FIELDS"}}, {"data": {"train": "FIELDS", "stratify": "colour"}}),
    "data.group": ({"data": {"train": "FIELDS"}}, {"data": {"train": "FIELDS", "group": "colour"}}),
    "data.checks": ({"data": {"train": "ODD"}}, {"data": {"train": "ODD", "checks": False}}),
    "data.benchmarks": ({"data": {"train": "WORDY"}}, {"data": {"train": "WORDY", "benchmarks": ["WORDY"]}}),
    "data.overlap": ({"data": {"test": "SAME"}}, {"data": {"test": "SAME", "overlap": "keep"}}),
    "data.train[].path": ({"data": {"train": [{"path": "ROWS"}]}}, {"data": {"train": [{"path": "MORE"}]}}),
    "data.train[].weight": (
        {"data": {"train": [{"path": "ROWS", "weight": 1}, {"path": "MORE", "weight": 1}]}},
        {"data": {"train": [{"path": "ROWS", "weight": 1}, {"path": "MORE", "weight": 9}]}},
    ),
    "data.train[].epochs": (
        {"data": {"train": [{"path": "ROWS"}]}},
        {"data": {"train": [{"path": "ROWS", "epochs": 2}]}},
    ),
    "data.train[].subset": (
        {"data": {"train": [{"path": "ROWS"}]}},
        {"data": {"train": [{"path": "ROWS", "subset": "main"}]}},
    ),
    "data.train[].split": (
        {"data": {"train": [{"path": "ROWS"}]}},
        {"data": {"train": [{"path": "ROWS", "split": "train"}]}},
    ),
    "data.train[].format": (
        {"data": {"train": [{"path": "ROWS"}]}},
        {"data": {"train": [{"path": "ROWS", "format": "alpaca"}]}},
    ),
    "data.train[].columns": (
        {"data": {"train": [{"path": "ROWS"}]}},
        {"data": {"train": [{"path": "ROWS", "columns": {"prompt": "completion", "completion": "prompt"}}]}},
    ),
    "method.kind": ({}, {"method": {"kind": "full"}}),
    "method.rank": ({}, {"method": {"rank": 3}}),
    "method.alpha": ({}, {"method": {"alpha": 8}}),
    "method.dropout": ({}, {"method": {"dropout": 0.5}}),
    "method.targets": ({}, {"method": {"targets": "qv"}}),
    "method.rslora": ({}, {"method": {"rslora": True}}),
    "method.rank_pattern": ({}, {"method": {"rank_pattern": {"q_proj": 4}}}),
    "method.alpha_pattern": ({}, {"method": {"alpha_pattern": {"q_proj": 64}}}),
    "method.modules_to_save": ({}, {"method": {"modules_to_save": ["norm"]}}),
    "method.trainable_tokens": ({}, {"method": {"trainable_tokens": [5]}}),
    "method.plus_ratio": ({}, {"method": {"plus_ratio": 4}}),
    "method.dora": ({}, {"method": {"dora": True}}),
    "method.init": ({}, {"method": {"init": "pissa"}}),
    "method.quantization_aware": ({}, {"method": {"quantization_aware": True}}),
    "method[qlora].kind": ({}, {"method": {"kind": "qlora", "rank": 2}}),
    "method[full].kind": ({}, FULL),
    "method[full].weights": (FULL, {"method": {"kind": "full", "weights": "norms"}}),
    "method[full].layer_decay": (FULL, {"method": {"kind": "full", "layer_decay": 0.5}}),
    "method[adapter].kind": ({}, ADAPTER),
    "method[adapter].placement": (ADAPTER, {"method": {"kind": "adapter", "placement": "parallel"}}),
    "method[adapter].reduction": (ADAPTER, {"method": {"kind": "adapter", "reduction": 4}}),
    "method[adapter].size": (ADAPTER, {"method": {"kind": "adapter", "size": 5}}),
    "method[adapter].activation": (ADAPTER, {"method": {"kind": "adapter", "activation": "relu"}}),
    "method[prefix].kind": ({}, PREFIX),
    "method[prefix].tokens": (PREFIX, {"method": {"kind": "prefix", "tokens": 4}}),
    "method[prefix].text": (PREFIX, {"method": {"kind": "prefix", "tokens": 3, "text": "Name the colour."}}),
    "method[prefix].init": (PREFIX, {"method": {"kind": "prefix", "tokens": 3, "init": "random"}}),
    "method[prefix].reparameterize": (PREFIX, {"method": {"kind": "prefix", "tokens": 3, "reparameterize": 8}}),
    "method[prompt].kind": ({}, PROMPT),
    "method[prompt].tokens": (PROMPT, {"method": {"kind": "prompt", "tokens": 4}}),
    "method[prompt].text": (PROMPT, {"method": {"kind": "prompt", "tokens": 3, "text": "Name the colour."}}),
    "method[prompt].init": (PROMPT, {"method": {"kind": "prompt", "tokens": 3, "init": "random"}}),
    "method[ia3].kind": ({}, {"method": {"kind": "ia3"}}),
    "method[ia3].targets": ({"method": {"kind": "ia3"}}, {"method": {"kind": "ia3", "targets": ["v_proj"]}}),
    "method[ia3].feedforward": (
        {"method": {"kind": "ia3"}},
        {"method": {"kind": "ia3", "feedforward": ["down_proj", "v_proj"]}},
    ),
    "method[peft].kind": ({}, {"method": {"kind": "peft", "type": "loha", "r": 2, "target_modules": "all-linear"}}),
    "method[peft].type": (
        {"method": {"kind": "peft", "type": "loha", "r": 2, "target_modules": "all-linear"}},
        {"method": {"kind": "peft", "type": "lokr", "r": 2, "target_modules": "all-linear"}},
    ),
    "train.groups": ({}, {"train": {"groups": [{"match": "lora_B", "rate": 0.5}]}}),
    "train.groups[].match": ({}, {"train": {"groups": [{"match": "layers.0", "rate": 0.5}]}}),
    "train.groups[].rate": ({}, {"train": {"groups": [{"match": "lora_A", "rate": 2}]}}),
    "train.groups[].weight_decay": ({}, {"train": {"groups": [{"match": "lora", "weight_decay": 0.5}]}}),
    "train.groups[].schedule": ({}, {"train": {"groups": [{"match": "lora_B", "schedule": "linear"}]}}),
    "train.ema": ({}, {"train": {"ema": 0.9}}),
    "train.shard": ({}, {"train": {"shard": True}}),
    "method[head].kind": ({}, HEAD),
    "method[head].solver": ({**LABELS, **HEAD}, {**LABELS, "method": {"kind": "head", "solver": "gradient"}}),
    "objective.kind": ({}, REFUSED),
    "objective.label_smoothing": ({}, {"objective": {"kind": "sft", "label_smoothing": 0.2}}),
    "objective.average": ({}, {"objective": {"kind": "sft", "average": "rows"}}),
    "objective.noise": ({}, {"objective": {"kind": "sft", "noise": 5}}),
    "objective[pretrain].kind": ({"data": {"train": "TEXT"}}, DOCUMENTS),
    "objective[pretrain].label_smoothing": (
        DOCUMENTS,
        {**DOCUMENTS, "objective": {"kind": "pretrain", "label_smoothing": 0.2}},
    ),
    "objective[dpo].kind": (DPO, preferring("simpo")),
    "objective[dpo].variant": (DPO, preferring("dpo", variant="ipo")),
    "objective[dpo].beta": (DPO, preferring("dpo", beta=0.5)),
    "objective[dpo].label_smoothing": (DPO, preferring("dpo", label_smoothing=0.2)),
    "objective[dpo].length_normalized": (DPO, preferring("dpo", length_normalized=True)),
    "objective[dpo].nll_weight": (DPO, preferring("dpo", nll_weight=0.5)),
    "objective[simpo].kind": (preferring("simpo"), DPO),
    "objective[simpo].beta": (preferring("simpo"), preferring("simpo", beta=3)),
    "objective[simpo].gamma": (preferring("simpo"), preferring("simpo", gamma=0.3)),
    "objective[orpo].kind": (preferring("orpo"), DPO),
    "objective[orpo].beta": (preferring("orpo"), preferring("orpo", beta=0.5)),
    "objective[orpo].likelihood": (preferring("orpo"), preferring("orpo", likelihood="conversation")),
    "objective[kto].kind": (DPO, preferring("kto")),
    "objective[kto].beta": (preferring("kto"), preferring("kto", beta=0.5)),
    "objective[kto].desirable_weight": (preferring("kto"), preferring("kto", desirable_weight=3)),
    "objective[kto].undesirable_weight": (preferring("kto"), preferring("kto", undesirable_weight=3)),
    "objective[reward].kind": (DPO, preferring("reward")),
    "objective[reward].margin": (preferring("reward"), preferring("reward", margin=1)),
    "objective[reward].centering": (preferring("reward"), preferring("reward", centering=1)),
    "objective[reward].head_rate": (preferring("reward"), preferring("reward", head_rate=3)),
    "objective[reward].layer": (preferring("reward"), preferring("reward", layer=1)),
    "objective[classify].kind": (NUMBERS, judging("classify", "NUMBERS")),
    "objective[classify].labels": (LABELS, judging("classify", "LABELS", labels=["no", "maybe", "yes"])),
    "objective[classify].multi_label": (LABELS, judging("classify", "LABELS", multi_label=True)),
    "objective[classify].class_weights": (LABELS, judging("classify", "LABELS", class_weights={"yes": 3})),
    "objective[classify].label_smoothing": (LABELS, judging("classify", "LABELS", label_smoothing=0.2)),
    "objective[classify].pooling": (LABELS, judging("classify", "LABELS", pooling="mean")),
    "objective[classify].head_rate": (LABELS, judging("classify", "LABELS", head_rate=3)),
    "objective[classify].layer": (LABELS, judging("classify", "LABELS", layer=1)),
    "objective[tag].kind": (TAGS, judging("classify", "TAGS")),
    "objective[tag].labels": (TAGS, judging("tag", "TAGS", labels=["O", "I-OBJ", "B-OBJ", "B-PER"])),
    "objective[tag].class_weights": (TAGS, judging("tag", "TAGS", class_weights="balanced")),
    "objective[tag].label_smoothing": (TAGS, judging("tag", "TAGS", label_smoothing=0.2)),
    "objective[tag].head_rate": (TAGS, judging("tag", "TAGS", head_rate=3)),
    "objective[tag].layer": (TAGS, judging("tag", "TAGS", layer=1)),
    "objective[regress].kind": (LABELS, judging("regress", "LABELS")),
    "objective[regress].pooling": (NUMBERS, judging("regress", "NUMBERS", pooling="mean")),
    "objective[regress].head_rate": (NUMBERS, judging("regress", "NUMBERS", head_rate=3)),
    "objective[regress].layer": (NUMBERS, judging("regress", "NUMBERS", layer=1)),
    "objective[regress].spread": (NUMBERS, judging("regress", "NUMBERS", spread=20)),
    "objective[grpo].kind": ({}, drawing()),
    "objective[grpo].reward": (drawing(), drawing(reward={"kind": "regex", "pattern": "o"})),
    "objective[grpo].group_size": (drawing(), drawing(group_size=5)),
    "objective[grpo].max_new_tokens": (drawing(), drawing(max_new_tokens=6)),
    "objective[grpo].sample_batch": None,
    "objective[grpo].rollouts": (drawing(), drawing(rollouts={"server": "http://127.0.0.1:9"})),
    "objective[grpo].rollouts.server": None,
    "objective[grpo].rollouts.adapters": None,
    "objective[grpo].rollouts.timeout": None,
    "objective[grpo].passes": (drawing(), drawing(passes=2)),
    "objective[grpo].clip": (drawing(passes=4), drawing(passes=4, clip=1e-6)),
    "objective[grpo].cut_penalty": (drawing(), drawing(cut_penalty=0.5)),
    "objective[grpo].kl": (drawing(), drawing(kl=1)),
    "objective[grpo].clip_high": (drawing(passes=4, clip=1e-6), drawing(passes=4, clip=1e-6, clip_high=0.3)),
    "objective[grpo].scale": (drawing(), drawing(scale="none")),
    "objective[grpo].average": (drawing(max_new_tokens=30), drawing(max_new_tokens=30, average="answer")),
    "objective[grpo].reward[exact].kind": (drawing(), drawing(reward="exact")),
    "objective[grpo].reward[number].kind": (drawing(), drawing(reward="number")),
    "objective[grpo].reward[json].kind": (drawing(), drawing(reward="json")),
    "objective[grpo].reward[json].keys": None,
    "objective[grpo].reward[json].schema_file": None,
    "objective[grpo].reward[regex].kind": (drawing(), drawing(reward={"kind": "regex", "pattern": "e"})),
    "objective[grpo].reward[regex].pattern": (
        drawing(reward={"kind": "regex", "pattern": "e"}),
        drawing(reward={"kind": "regex", "pattern": "o"}),
    ),
    "objective[grpo].reward[function].kind": (drawing(reward={"kind": "regex", "pattern": "e"}), drawing()),
    "objective[grpo].reward[function].path": (drawing(), drawing(reward={"kind": "function", "path": "OURS"})),
    "objective[grpo].reward[function].weight": (
        drawing(),
        drawing(reward={"kind": "function", "path": "MINE", "weight": 2}),
    ),
    "objective[grpo].reward[model].kind": None,
    "objective[grpo].reward[model].path": None,
    "objective[rloo].kind": (drawing(), drawing("rloo")),
    "objective[rloo].kl": (drawing("rloo"), drawing("rloo", kl=1)),
    "objective[ppo].kind": (drawing(), drawing("ppo")),
    "objective[ppo].group_size": (drawing("ppo"), drawing("ppo", group_size=2)),
    "objective[ppo].passes": (drawing("ppo"), drawing("ppo", passes=1)),
    "objective[ppo].kl": (drawing("ppo", passes=1), drawing("ppo", passes=1, kl=1)),
    "objective[ppo].kl_target": (drawing("ppo", passes=1), drawing("ppo", passes=1, kl_target=9)),
    "objective[ppo].gamma": (drawing("ppo"), drawing("ppo", gamma=0.5)),
    "objective[ppo].lam": (drawing("ppo"), drawing("ppo", lam=0.1)),
    "objective[ppo].value_clip": (drawing("ppo"), drawing("ppo", value_clip=1e-6)),
    "objective[ppo].value_weight": (drawing("ppo"), drawing("ppo", value_weight=5)),
    "objective[ppo].whiten_rewards": (drawing("ppo"), drawing("ppo", whiten_rewards=True)),
    "objective[distill].kind": ({}, distilled()),
    "objective[distill].teacher": (distilled(), distilled(teacher="MODEL")),
    "objective[distill].teacher_prompt": (distilled(), distilled(teacher_prompt="Be brief.")),
    "objective[distill].answers": (distilled(), distilled(answers="teacher")),
    "objective[distill].on_policy": (distilled(), distilled(on_policy=1)),
    "objective[distill].sample_temperature": (distilled(on_policy=1), distilled(on_policy=1, sample_temperature=0)),
    "objective[distill].max_new_tokens": (distilled(on_policy=1), distilled(on_policy=1, max_new_tokens=3)),
    "objective[distill].divergence": (distilled(), distilled(divergence="reverse-kl")),
    "objective[distill].beta": (distilled(divergence="jsd"), distilled(divergence="jsd", beta=0.2)),
    "objective[distill].temperature": (distilled(), distilled(temperature=2)),
    "objective[distill].weight": (distilled(), distilled(weight=0.5)),
    "objective[distill].top_k": (distilled(), distilled(top_k=3)),
    "train.epochs": ({}, {"train": {"epochs": 0.2}}),
    "train.steps": ({}, {"train": {"steps": 3}}),
    "train.batch_size": ({}, {"train": {"batch_size": 6}}),
    "train.micro_batch": ({}, {"train": {"micro_batch": 1}}),
    "train.learning_rate": ({}, {"train": {"learning_rate": 0.01}}),
    "train.schedule": ({}, {"train": {"schedule": "wsd"}}),
    "train.warmup": ({}, {"train": {"warmup": 3}}),
    "train.weight_decay": ({}, {"train": {"weight_decay": 0.5}}),
    "train.kl_to_base": ({}, {"train": {"kl_to_base": 1}}),
    "train.kl_on": (
        {"data": {"replay": {"path": "MORE"}}, "train": {"kl_to_base": 1}},
        {"data": {"replay": {"path": "MORE"}}, "train": {"kl_to_base": 1, "kl_on": "replay"}},
    ),
    "train.l2_to_base": ({}, {"train": {"l2_to_base": 1}}),
    "train.clip": ({}, {"train": {"clip": 0.001}}),
    # bitsandbytes keeps states of fewer than 4,096 weights in 32 bits.
    "train.optimizer": (
        {"method": {"rank": 128}},
        {"method": {"rank": 128}, "train": {"optimizer": "adamw-8bit"}},
    ),
    "train.dtype": ({}, {"train": {"dtype": "bf16"}}),
    "train.packing": ({}, {"train": {"packing": False}}),
    "train.gradient_checkpointing": ({}, {"train": {"gradient_checkpointing": True}}),
    "train.evaluate_every": ({}, {"train": {"evaluate_every": 2}}),
    "train.generate_every": ({}, {"train": {"generate_every": 2}}),
    "train.checkpoint_every": (
        {"train": {"evaluate_every": "off", "checkpoint_every": "off"}},
        {"train": {"evaluate_every": "off", "checkpoint_every": 1}},
    ),
    "train.keep": (
        {"train": {"evaluate_every": "off", "checkpoint_every": 1}},
        {"train": {"evaluate_every": "off", "checkpoint_every": 1, "keep": 1}},
    ),
    "train.bad_step": (
        {"train": {"spike": 1.00001, "steps": 16}},
        {"train": {"spike": 1.00001, "steps": 16, "bad_step": "stop"}},
    ),
    "train.spike": ({"train": {"steps": 16}}, {"train": {"steps": 16, "spike": 1.00001}}),
    "train.early_stopping": (
        {"train": {"learning_rate": 1e-6}},
        {"train": {"learning_rate": 1e-6, "early_stopping": {"patience": 1, "min_delta": 1}}},
    ),
    "train.early_stopping.patience": (
        {"train": {"early_stopping": {"patience": 1, "min_delta": 9}}},
        {"train": {"early_stopping": {"patience": 2, "min_delta": 9}}},
    ),
    "train.early_stopping.min_delta": (
        {"train": {"learning_rate": 0.002, "early_stopping": {"patience": 1, "min_delta": 0}}},
        {"train": {"learning_rate": 0.002, "early_stopping": {"patience": 1, "min_delta": 9}}},
    ),
    "train.best": (
        {"train": {"learning_rate": 0.3, "steps": 24, "schedule": "constant"}},
        {"train": {"learning_rate": 0.3, "steps": 24, "schedule": "constant", "best": "last"}},
    ),
    "train.log": ({}, {"train": {"log": ["tensorboard"]}}),
    "evaluate": ({}, {"evaluate": "off"}),
    "evaluate.rows": ({}, {"evaluate": {"rows": 3}}),
    "evaluate.metrics": ({}, {"evaluate": {"metrics": ["chrf"]}}),
    "evaluate.metrics.python": ({"evaluate": {"metrics": ["MINE"]}}, {"evaluate": {"metrics": ["OURS"]}}),
    "evaluate.metrics.sql": (
        {"evaluate": {"metrics": [{"sql": "prompt"}]}},
        {"evaluate": {"metrics": [{"sql": "SCHEMA"}]}},
    ),
    "evaluate.max_new_tokens": ({}, {"evaluate": {"max_new_tokens": 2}}),
    "evaluate.batch_size": None,
    "evaluate.resamples": ({}, {"evaluate": {"resamples": 40}}),
    "evaluate.confidence": ({}, {"evaluate": {"confidence": 0.6}}),
    "evaluate.forgetting": ({}, {"evaluate": {"forgetting": "GENERAL"}}),
    "evaluate.samples": ({}, {"evaluate": {"samples": 2}}),
    "evaluate.benchmarks": None,
    "evaluate.benchmark_limit": None,
    "evaluate.benchmark_shots": None,
    "evaluate.benchmark_data": None,
    "evaluate.kl_prompts": None,
    "evaluate.memorisation": (LONG, {**LONG, "evaluate": {"max_new_tokens": 12, "memorisation": "off"}}),
    "evaluate.memorisation.rows": (
        {**LONG, "evaluate": {"max_new_tokens": 12, "memorisation": {"rows": 3}}},
        {**LONG, "evaluate": {"max_new_tokens": 12, "memorisation": {"rows": 4}}},
    ),
    "gate": ({}, {"gate": {"f1": 0.9}}),
    "budget.memory": ({}, {"budget": {"memory": "512MB"}}),
    "budget.time": None,
    "budget.money": None,
    "budget.hourly_price": None,
    "output": None,
    "seed": ({}, {"seed": 1}),
}
ELSEWHERE = {
    "evaluate.benchmarks": "it needs items of benchmarks; test_forgetting_gate",
    "evaluate.benchmark_limit": "the same; test_benchmarks",
    "evaluate.benchmark_shots": "the same; test_benchmarks",
    "evaluate.benchmark_data": "the same; test_forgetting_gate",
    "evaluate.kl_prompts": "test_forgetting_gate",
    "evaluate.batch_size": "answers do not depend on it; test_batch_size_reaches_generation",
    "model.revision": "test_a_revision_reaches_the_hub_client",
    "budget.time": "a job is refused or not; test_plan_budget",
    "budget.money": "the same",
    "budget.hourly_price": "the same",
    "output": "the directory itself; test_pipeline",
    "objective[grpo].sample_batch": "no answer depends on it; test_rollouts",
    "objective[grpo].rollouts.server": "it needs a server; test_rollout_server",
    "objective[grpo].rollouts.adapters": "the same",
    "objective[grpo].rollouts.timeout": "the same",
    "objective[grpo].reward[json].keys": "a random model writes no JSON; test_rewards",
    "objective[grpo].reward[json].schema_file": "the same",
    "objective[grpo].reward[model].kind": "it needs a model that was trained before; test_rewards",
    "objective[grpo].reward[model].path": "the same",
}


def schema_fields() -> set[str]:
    """Every field of the schema by its dotted name."""
    nested: dict[str, list[type[BaseModel]]] = {
        "model": [ModelSpec],
        "data": [DataSpec],
        "data.train[]": [SourceSpec],
        "data.replay": [ReplaySpec],
        "method": [Lora],
        "method[full]": [Full],
        "method[qlora]": [QLora],
        "method[adapter]": [Adapter],
        "method[prefix]": [Prefix],
        "method[prompt]": [Prompt],
        "method[ia3]": [Ia3],
        "method[peft]": [Peft],
        "method[head]": [HeadOnly],
        "objective[classify]": [Classify],
        "objective[tag]": [Tag],
        "objective[regress]": [Regress],
        "objective": [Supervised],
        "evaluate.metrics": [PythonMetric, SqlMetric],
        "objective[pretrain]": [Pretrain],
        "objective[dpo]": [Dpo],
        "objective[simpo]": [SimPo],
        "objective[orpo]": [Orpo],
        "objective[kto]": [Kto],
        "objective[reward]": [Reward],
        "objective[grpo]": [Grpo],
        "objective[rloo]": [Rloo],
        "objective[ppo]": [Ppo],
        "objective[grpo].reward[exact]": [ExactReward],
        "objective[grpo].reward[regex]": [RegexReward],
        "objective[grpo].reward[json]": [JsonReward],
        "objective[grpo].reward[number]": [NumberReward],
        "objective[grpo].reward[function]": [FunctionReward],
        "objective[grpo].reward[model]": [ModelReward],
        "objective[grpo].rollouts": [RolloutServer],
        "objective[distill]": [Distill],
        "train": [TrainSpec],
        "train.groups[]": [GroupSpec],
        "train.early_stopping": [EarlyStopping],
        "evaluate": [EvaluateSpec],
        "evaluate.memorisation": [MemorisationSpec],
        "budget": [BudgetSpec],
    }
    names = {name for name in Recipe.model_fields if name not in nested} | {"evaluate", "train.early_stopping"}
    for prefix, models in nested.items():
        for model in models:
            # What is inherited is told apart by one of those that have it.
            inherited = Lora.model_fields.keys() - {"kind"} if model is QLora else set[str]()
            if model in (Rloo, Ppo):
                inherited = Policy.model_fields.keys() - vars(model)["__annotations__"].keys()
            if issubclass(model, RewardSpec) and model is not FunctionReward:
                inherited = set(RewardSpec.model_fields)
            names |= {f"{prefix}.{name}" for name in model.model_fields.keys() - inherited}
    return names


def test_no_field_of_the_schema_is_missing_from_this_table() -> None:
    assert schema_fields() == set(CHANGES)
    assert {name for name, change in CHANGES.items() if change is None} == set(ELSEWHERE)


WORDY = "and then in as many other words as a benchmark would need to have in a row"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("settings")
    rows = colour_rows(36)
    general = root / "general.txt"
    general.write_text("The quick brown fox jumps over the lazy dog.\n\nAnother passage of text.\n" * 4)
    schema = root / "schema.sql"
    schema.write_text("CREATE TABLE colours (name TEXT)")
    labels = [{"text": row["prompt"], "label": "yes" if at % 3 else "no"} for at, row in enumerate(rows)]
    numbers = [{"text": row["prompt"], "label": at % 5} for at, row in enumerate(rows)]
    return {
        "MODEL": build_model(root / "model"),
        "OTHER": build_model(root / "other", hidden_size=48),
        "ROWS": write_jsonl(root / "rows.jsonl", rows),
        "MORE": write_jsonl(root / "more.jsonl", colour_rows(40, start=200)),
        "SAME": write_jsonl(root / "same.jsonl", rows[:8]),
        "MESSY": write_jsonl(root / "messy.jsonl", MESSY),
        "TEXT": write_jsonl(root / "text.jsonl", [{"text": f"Q: {r['prompt']} A: {r['completion']}"} for r in rows]),
        "TWIN": write_jsonl(root / "twin.jsonl", colour_rows(40, start=400)),
        "FIELDS": write_jsonl(root / "fields.jsonl", [{**row, "colour": row["prompt"].split()[1]} for row in rows]),
        "ODD": write_jsonl(root / "odd.jsonl", [*rows, {"prompt": "Mail me", "completion": "ann.lee@web.de"}]),
        "WORDY": write_jsonl(root / "wordy.jsonl", [{**r, "prompt": f"{r['prompt']} {WORDY}"} for r in rows]),
        "TRUNK": build_trunk(root / "trunk", "llama"),
        "LABELS": write_jsonl(root / "labels.jsonl", labels),
        "NUMBERS": write_jsonl(root / "numbers.jsonl", numbers),
        "TAGS": write_jsonl(root / "tags.jsonl", tag_rows(36)),
        "PAIRS": write_jsonl(root / "pairs.jsonl", [_pair(row) for row in rows]),
        "UNPAIRED": write_jsonl(
            root / "unpaired.jsonl", [{**row, "label": at % 2 == 0} for at, row in enumerate(rows)]
        ),
        "GENERAL": general,
        "SCHEMA": schema,
        "MINE": Path(f"{_function(root / 'mine.py', 'e')}:score"),
        "OURS": Path(f"{_function(root / 'ours.py', 'o')}:score"),
        "LONG": write_jsonl(root / "long.jsonl", [{**r, "completion": f"{r['prompt']} is said {WORDY}"} for r in rows]),
        "ROOT": root,
    }


def _function(path: Path, letter: str) -> Path:
    path.write_text(f"def score(prompt, answer, references):\n    return answer.count({letter!r}) + len(answer) / 9\n")
    return path


def _pair(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['completion'].lower()} no"}


def recipe_of(sections: dict[str, Any], places: dict[str, Path], output: Path) -> Recipe:
    """The recipe of a job with these sections in place of the usual ones."""
    values: dict[str, Any] = json.loads(json.dumps(BASE))
    values["model"] = {"path": str(places["MODEL"])}
    values["data"]["train"] = str(places["ROWS"])
    for name, section in sections.items():
        if name == "method" and isinstance(section, dict) and section.get("kind", "lora") != "lora":
            values[name] = section
        elif isinstance(section, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **section}
        else:
            values[name] = section
    text = json.dumps(values)
    for name, path in places.items():
        text = text.replace(f'"{name}"', json.dumps(str(path)))
    return check_recipe({**json.loads(text), "output": str(output)}, "test")


def planned(sections: dict[str, Any], places: dict[str, Path], output: Path) -> dict[str, Any]:
    """What a job would do, without times and the echo of its recipe; or the error that refused it."""
    try:
        return plan_job(recipe_of(sections, places, output)).plan.model_dump(exclude={"time"})
    except TunesmithError as error:
        return {"refused": error.what}


def done(sections: dict[str, Any], places: dict[str, Path], output: Path) -> dict[str, Any]:
    """What a job did, without times and paths; or the error that refused it."""
    try:
        run = finetune(recipe_of(sections, places, output))
    except TunesmithError as error:
        return {"refused": error.what}
    plan = {name: value for name, value in run.read("plan.json").items() if name != "time"}
    events = [{k: v for k, v in event.items() if k not in ("seconds", "report")} for event in run.events()]
    report = run.report or {}
    evidence = {
        name: report[name] for name in ("verdict", "metrics", "forgetting", "samples", "gate", "data", "memorisation")
    }
    files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_dir())
    result = next(run.path.glob("*/*model.safetensors"))
    digest = hashlib.sha256(result.read_bytes()).hexdigest()
    return {"plan": plan, "events": events, "evidence": evidence, "files": files, "weights": digest}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {}


@pytest.mark.parametrize(
    "name", [name for name, change in CHANGES.items() if change is not None and change[1] is not REFUSED]
)
def test_changing_a_setting_changes_the_plan_or_the_run(
    name: str, places: dict[str, Path], references: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    before, after = CHANGES[name]

    def differs(found: Callable[[dict[str, Any], dict[str, Path], Path], dict[str, Any]]) -> bool:
        key = f"{found.__name__} {json.dumps(before)}"
        if key not in references:
            references[key] = found(before, places, tmp_path / "before")
        return found(after, places, tmp_path / "after") != references[key]

    assert differs(planned) or differs(done)


def test_the_same_settings_make_the_same_plan(places: dict[str, Path], tmp_path: Path) -> None:
    assert planned({}, places, tmp_path / "a") == planned({}, places, tmp_path / "b")


def test_what_is_refused_is_an_effect_too(places: dict[str, Path]) -> None:
    with pytest.raises(InputError):
        check_recipe({"model": "x", "data": {"train": "y"}, "objective": {"kind": "nothing"}}, "test")


def test_a_revision_reaches_the_hub_client(monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> None:
    from tunesmith.pipeline import planning

    asked: list[Any] = []
    read = planning.read_config

    def recorded(path: str, revision: str | None = None) -> Any:
        asked.append(revision)
        return read(path)

    monkeypatch.setattr(planning, "read_config", recorded)
    model = {"path": str(places["MODEL"]), "revision": "abc"}
    planning.plan_job(check_recipe({"model": model, "data": {"train": str(places["ROWS"])}}, "test"))
    assert asked == ["abc"]


def test_batch_size_reaches_generation(
    monkeypatch: pytest.MonkeyPatch, places: dict[str, Path], tmp_path: Path
) -> None:
    from tunesmith.evaluation import answers

    sizes: list[int] = []
    generate = answers.generate

    def recorded(*arguments: Any, batch_size: int, **settings: Any) -> Any:
        sizes.append(batch_size)
        return generate(*arguments, batch_size=batch_size, **settings)

    monkeypatch.setattr(answers, "generate", recorded)
    done({"evaluate": {"batch_size": 3}}, places, tmp_path / "run")
    assert set(sizes) == {3}
