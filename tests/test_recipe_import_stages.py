"""Preference and reward stages of axolotl and LLaMA-Factory: the objective, its settings and the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import write_jsonl
from tunesmith.base import InputError, Source
from tunesmith.data.convert import CONVERTERS
from tunesmith.data.formats import choose_format, mapped
from tunesmith.data.record import Record
from tunesmith.recipe_import import LOUD, Imported, import_recipe

FACTORY = "model_name_or_path: a/b\ndataset: rows\n"
AXOLOTL = "base_model: a/b\nlearning_rate: 1e-5\n"


def imported(place: Path, text: str, info: dict[str, Any] | None = None) -> Imported:
    if info is not None:
        (place / "data").mkdir(exist_ok=True)
        (place / "data" / "dataset_info.json").write_text(json.dumps({"rows": info}))
    (place / "file.yml").write_text(text)
    return import_recipe(place / "file.yml")


def objective(found: Imported) -> dict[str, Any]:
    return {"kind": found.recipe.objective.kind, **found.recipe.objective.model_dump(exclude_defaults=True)}


STAGES: list[tuple[str, dict[str, Any]]] = [
    (f"{FACTORY}stage: rm\n", {"kind": "reward"}),
    (f"{FACTORY}stage: dpo\n", {"kind": "dpo"}),
    (
        f"{FACTORY}stage: dpo\npref_loss: ipo\npref_beta: 0.3\npref_ftx: 0.5\n",
        {"kind": "dpo", "variant": "ipo", "beta": 0.3, "nll_weight": 0.5},
    ),
    (
        f"{FACTORY}stage: dpo\npref_loss: hinge\ndpo_label_smoothing: 0.1\n",
        {"kind": "dpo", "variant": "hinge"},
    ),
    (f"{FACTORY}stage: dpo\ndpo_label_smoothing: 0.1\n", {"kind": "dpo", "label_smoothing": 0.1}),
    (f"{FACTORY}stage: dpo\npref_loss: kto_pair\n", {"kind": "dpo"}),
    (f"{FACTORY}stage: dpo\npref_loss: simpo\n", {"kind": "simpo", "beta": 0.1, "gamma": 0.5}),
    (f"{FACTORY}stage: dpo\npref_loss: orpo\npref_beta: 0.2\n", {"kind": "orpo", "beta": 0.2}),
    (
        f"{FACTORY}stage: kto\nkto_chosen_weight: 1.3\nkto_rejected_weight: 0.8\n",
        {"kind": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.8},
    ),
    (
        f"{FACTORY}stage: ppo\nreward_model: out/rm\nppo_epochs: 2\nppo_target: 4\nppo_whiten_rewards: true\n"
        "max_new_tokens: 64\n",
        {
            "kind": "ppo",
            "reward": [{"path": "out/rm"}],
            "passes": 2,
            "kl": 0.2,
            "kl_target": 4.0,
            "whiten_rewards": True,
            "max_new_tokens": 64,
        },
    ),
    (f"{AXOLOTL}datasets: [{{path: x}}]\nreward_model: true\n", {"kind": "reward"}),
    (
        f"{AXOLOTL}datasets: [{{path: x}}]\nrl: dpo\nrl_beta: 0.2\nrpo_alpha: 1\ndpo_norm_loss: true\n",
        {"kind": "dpo", "beta": 0.2, "nll_weight": 1.0, "length_normalized": True},
    ),
    (f"{AXOLOTL}datasets: [{{path: x}}]\nrl: ipo\n", {"kind": "dpo", "variant": "ipo"}),
    (
        f"{AXOLOTL}datasets: [{{path: x}}]\nrl: kto\nkto_undesirable_weight: 0.2\n",
        {"kind": "kto", "undesirable_weight": 0.2},
    ),
    (
        f"{AXOLOTL}datasets: [{{path: x}}]\nrl: orpo\norpo_alpha: 0.3\nrl_beta: 9\n",
        {"kind": "orpo", "beta": 0.3, "likelihood": "conversation"},
    ),
    (
        f"{AXOLOTL}datasets: [{{path: x}}]\nrl: simpo\nrl_beta: 2.5\nsimpo_gamma: 0.4\n",
        {"kind": "simpo", "beta": 2.5, "gamma": 0.4},
    ),
    (
        f"{AXOLOTL}datasets: [{{path: x}}]\nrl: grpo\n"
        "trl: {reward_funcs: [pack.mine.score, b.c], reward_weights: [2, 1], "
        "num_generations: 4, max_completion_length: 99, beta: 0.01, epsilon_high: 0.28, loss_type: dr_grpo, "
        "scale_rewards: false, use_vllm: true}\n",
        {
            "kind": "grpo",
            "reward": [{"path": "pack/mine.py:score", "weight": 2.0}, {"path": "b.py:c"}],
            "group_size": 4,
            "max_new_tokens": 99,
            "kl": 0.01,
            "clip_high": 0.28,
            "average": "budget",
            "scale": "none",
        },
    ),
]


@pytest.mark.parametrize(("text", "expected"), STAGES)
def test_stages_become_objectives(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found = imported(tmp_path, text)
    said = objective(found)
    for reward in said.get("reward", []):
        reward.pop("kind", None)
    assert said == expected
    names = {line.partition(":")[0] for line in text.splitlines()}
    assert names <= {key.key for key in found.keys}


def note_of(found: Imported, key: str) -> str:
    return next(one.note for one in found.keys if one.key == key)


def test_what_becomes_something_else_is_said_aloud(tmp_path: Path) -> None:
    pairs = imported(tmp_path, f"{FACTORY}stage: dpo\npref_loss: kto_pair\nref_model: c/d\nneftune_noise_alpha: 5\n")
    for key, what in (("pref_loss", "DPO's own"), ("ref_model", "as this job began"), ("neftune_noise_alpha", "noise")):
        assert note_of(pairs, key).startswith(LOUD) and what in note_of(pairs, key)
    ppo = imported(
        tmp_path, f"{FACTORY}stage: ppo\nreward_model: r\ntop_p: 0.7\nppo_score_norm: true\nppo_buffer_size: 4\n"
    )
    for key in ("top_p", "ppo_score_norm", "ppo_buffer_size", "reward_model"):
        assert note_of(ppo, key).startswith(LOUD)
    assert note_of(imported(tmp_path, f"{FACTORY}stage: sft\npref_beta: 0.3\n"), "pref_beta") == "other stages only"
    rows = f"{AXOLOTL}datasets: [{{path: x}}]\n"
    grpo = imported(tmp_path, f"{rows}rl: grpo\ntrl: {{reward_funcs: [a.b], temperature: 0.7, reward_fnucs: [c.d]}}\n")
    assert note_of(grpo, "trl.temperature").startswith(LOUD) and "one answer" in note_of(grpo, "trl.reward_funcs")
    assert "did you mean 'reward_funcs'" in note_of(grpo, "trl.reward_fnucs")
    assert "other stages only" in note_of(
        imported(tmp_path, f"{AXOLOTL}datasets: [{{path: x}}]\nrl_beta: 1\n"), "rl_beta"
    )


def read(found: Imported, row: dict[str, Any]) -> Any:
    """The row as this recipe reads it."""
    record = Record(row, Source("x", 1))
    format_name, columns = choose_format([record], found.recipe.data.format, found.recipe.data.columns)
    return CONVERTERS[format_name](mapped(record, columns) if columns else record)


TURN = {"from": "human", "value": "Q"}
FACTORY_ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "dpo",
        {"ranking": True, "columns": {"prompt": "ask", "query": "about", "chosen": "good", "rejected": "bad"}},
        {"ask": "Q", "about": "", "good": "A", "bad": "B"},
    ),
    (
        "rm",
        {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "turns", "chosen": "c", "rejected": "r"}},
        {"turns": [TURN], "c": {"from": "gpt", "value": "A"}, "r": {"from": "gpt", "value": "B"}},
    ),
    (
        "kto",
        {"columns": {"prompt": "ask", "response": "said", "kto_tag": "good"}},
        {"ask": "Q", "said": "A", "good": True},
    ),
]


@pytest.mark.parametrize(("stage", "info", "row"), FACTORY_ROWS)
def test_rows_of_llamafactory_are_read(stage: str, info: dict[str, Any], row: dict[str, Any], tmp_path: Path) -> None:
    found = imported(tmp_path, f"{FACTORY}stage: {stage}\n", {"file_name": "rows.jsonl", **info})
    one = read(found, row)
    assert [turn["content"] for turn in one.messages] == ["Q", "A"]
    assert one.desirable if stage == "kto" else one.rejected[-1]["content"] == "B"


def test_rows_of_another_stage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds preference pairs"):
        imported(tmp_path, f"{FACTORY}stage: sft\n", {"file_name": "x.jsonl", "ranking": True})
    with pytest.raises(InputError, match="holds no preference pairs"):
        imported(tmp_path, f"{FACTORY}stage: dpo\n", {"file_name": "x.jsonl"})
    with pytest.raises(InputError, match="conversations with a label"):
        imported(tmp_path, f"{FACTORY}stage: kto\n", {"file_name": "x.jsonl", "formatting": "sharegpt"})


PAIR = {"chosen": "A", "rejected": "B"}
AXOLOTL_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("dpo", "type: chatml.intel", {"question": "Q", **PAIR}),
    ("dpo", "type: llama3.argilla", {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}),
    ("simpo", "type: chatml.icr", {"input": "Q", **PAIR}),
    ("ipo", "type: chatml.prompt_pairs", {"prompt": "Q", **PAIR}),
    (
        "dpo",
        "type: chat_template.default, field_messages: turns, field_chosen: c, field_rejected: r",
        {
            "turns": [{"role": "user", "content": "Q"}],
            "c": {"role": "assistant", "content": "A"},
            "r": {"role": "assistant", "content": "B"},
        },
    ),
    (
        "orpo",
        "type: chat_template.argilla_chat",
        {side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": PAIR[side]}] for side in PAIR},
    ),
    ("dpo", "type: {field_prompt: q, field_chosen: c, field_rejected: r}", {"q": "Q", "c": "A", "r": "B"}),
    ("kto", "type: chatml.argilla", {"instruction": "Q", "completion": "A", "label": True}),
    ("kto", "type: {field_prompt: q, field_completion: a, field_label: l}", {"q": "Q", "a": "A", "l": True}),
]


@pytest.mark.parametrize(("kind", "type_name", "row"), AXOLOTL_ROWS)
def test_rows_of_axolotl_are_read(kind: str, type_name: str, row: dict[str, Any], tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    found = imported(tmp_path, f"{AXOLOTL}rl: {kind}\ndatasets:\n  - {{path: {rows}, {type_name}}}\n")
    one = read(found, row)
    assert [turn["content"] for turn in one.messages] == ["Q", "A"]
    assert one.desirable if kind == "kto" else one.rejected[-1]["content"] == "B"
    unknown = imported(tmp_path, f"{AXOLOTL}rl: {kind}\ndatasets:\n  - {{path: {rows}, type: chatml.other}}\n")
    assert unknown.recipe.data.format == "auto" and note_of(unknown, "datasets.0.type").startswith(LOUD)
