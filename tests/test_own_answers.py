"""Replay: raw text beside conversations, and the base's own answers, made once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.data.general_prompts import general_prompts
from tunesmith.models.load import locate_model, read_config
from tunesmith.pipeline import own_answers
from tunesmith.pipeline.estimating import estimate_job
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import check_recipe


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A model whose answers end: a random one hardly ever says its end of turn."""
    root = tmp_path_factory.mktemp("talker")
    rows = write_jsonl(root / "rows.jsonl", [{"prompt": f"Say {at}", "completion": "red"} for at in range(40)])
    recipe = {
        "model": str(tiny_model),
        "data": {"train": str(rows), "checks": False},
        "method": "full",
        "train": {"steps": 30, "batch_size": 8, "learning_rate": 0.01, "dtype": "fp32"},
        "evaluate": "off",
        "output": str(root / "run"),
    }
    finetune(check_recipe(recipe, "test"))
    return root / "run" / "model"


def recipe(model: Path, rows: Path, output: Path, replay: Any, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(rows), "test": 0.2, "replay": replay, "checks": False},
        "train": {"steps": 6, "batch_size": 8, "learning_rate": 0.01, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 4, "resamples": 20, "rows": 8, "forgetting": "off"},
        "output": str(output),
        **sections,
    }
    return check_recipe(values, "test")


def replayed(planned: Any) -> list[Any]:
    train = planned.prepared.train
    places = planned.prepared.order.members[-1].tolist()
    return [train[at].row for at in places]


def test_prompts_are_many_and_all_different() -> None:
    assert len(set(general_prompts())) == len(general_prompts()) == 384


def test_the_base_answers_once_and_its_answers_are_kept(
    talker: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(talker, rows_file, tmp_path / "run", {"path": "self", "answers": 20, "max_new_tokens": 24})
    before = estimate_job(asked)
    assert any("the base first answers up to 20 prompts" in note for note in before.plan.notes)
    planned = plan_job(asked)
    rows = replayed(planned)
    assert rows and all(row.messages[0]["content"] in general_prompts() for row in rows)
    assert planned.prepared is not None
    manifest = planned.prepared.manifest()
    assert manifest["sources"][-1]["path"] == "self" == manifest["mixture"][-1]["path"]
    assert any("answered 20 prompts" in note for note in planned.plan.notes)
    places = manifest["mixture"]
    assert places[-1]["places"] == round(places[0]["places"] / 9)  # a tenth of the epoch

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the answers are on disk")

    monkeypatch.setattr(own_answers, "load_model", never)
    assert [row.messages for row in replayed(plan_job(asked))] == [row.messages for row in rows]
    assert estimate_job(asked).plan.workload.epoch_rows == planned.plan.workload.epoch_rows


def test_answers_are_those_of_the_seed_and_follow_what_they_are_made_from(talker: Path, rows_file: Path) -> None:
    def made_from(**replay: Any) -> str:
        asked = recipe(talker, rows_file, Path("x"), {"path": "self", **replay})
        base = own_answers.Base(str(talker), read_config(locate_model(str(talker))), plan_tokenizer(talker))
        return json.dumps(own_answers._asked(asked, base).made_from(), sort_keys=True)

    same = made_from(answers=5)
    assert same == made_from(answers=5)
    assert (
        len({same, made_from(answers=6), made_from(answers=5, temperature=0), made_from(answers=5, max_new_tokens=9)})
        == 4
    )


def plan_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_a_run_with_own_answers_comes_out_the_same_when_they_are_made_anew(
    talker: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name in ("one", "two"):
        monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / f"cache-{name}"))
        run = finetune(
            recipe(talker, rows_file, tmp_path / name, {"path": "self", "answers": 12, "max_new_tokens": 24})
        )
        assert run.result is not None
        digests.append((run.result / "adapter_model.safetensors").read_bytes())
        assert (run.path / "recipe.yaml").read_text().count("path: self") == 1
        assert run.read("data.json")["sources"][-1]["path"] == "self"
    assert digests[0] == digests[1]


def test_prompts_come_from_a_file(talker: Path, rows_file: Path, tmp_path: Path) -> None:
    asks = write_jsonl(
        tmp_path / "asks.jsonl", [{"prompt": f"Say {at}", "completion": "never used"} for at in range(9)]
    )
    planned = plan_job(
        recipe(talker, rows_file, tmp_path / "run", {"path": "self", "prompts": str(asks), "max_new_tokens": 24})
    )
    rows = replayed(planned)
    assert {row.messages[0]["content"] for row in rows} <= {f"Say {at}" for at in range(9)}
    assert all(row.references[0] != "never used" for row in rows)


def test_documents_are_replayed_as_documents(talker: Path, tmp_path: Path) -> None:
    texts = [{"text": f"red {at} " * 12} for at in range(30)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    asks = write_jsonl(tmp_path / "asks.jsonl", [{"text": f"Say {at}"} for at in range(12)])
    replay = {"path": "self", "prompts": str(asks), "max_new_tokens": 60, "temperature": 0}
    try:
        planned = plan_job(recipe(talker, corpus, tmp_path / "run", replay, objective="pretrain", evaluate="off"))
    except InputError as error:  # a model that goes on without end is said to
        assert error.where == "data.replay.max_new_tokens" and "none of the base's 12 answers ended" in error.what
        return
    rows = replayed(planned)
    assert rows and all(row.text.startswith("Say ") and not row.messages for row in rows)


def test_answers_that_never_end_are_an_error(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the base's 4 answers ended within 1 tokens") as error:
        plan_job(recipe(tiny_model, rows_file, tmp_path / "run", {"path": "self", "answers": 4, "max_new_tokens": 1}))
    assert error.value.where == "data.replay.max_new_tokens"


def test_a_small_memory_cannot_answer(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whole model in memory"):
        plan_job(recipe(tiny_model, rows_file, tmp_path / "run", "self", budget={"memory": "8GB"}))


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        ({"path": "rows.jsonl", "answers": 4}, "answers is for replay.path: self"),
        ({"path": "self", "split": "train"}, "subset and split are for data sets"),
        ({"path": "self", "format": "text"}, "none is named"),
    ],
)
def test_settings_that_do_not_fit_are_refused(replay: dict[str, Any], said: str, rows_file: Path) -> None:
    with pytest.raises(InputError, match=said):
        recipe(Path("x"), rows_file, Path("y"), replay)


def test_raw_text_is_replayed_beside_answers(tiny_model: Path, tmp_path: Path) -> None:
    """And the task's marker is not looked for in it."""
    rows = [{"text": f"Q: {row['prompt']} A: {row['completion']}"} for row in colour_rows(40)]
    task = write_jsonl(tmp_path / "task.jsonl", rows)
    general = write_jsonl(tmp_path / "general.jsonl", [{"text": f"general text {at}"} for at in range(20)])
    asked = recipe(tiny_model, task, tmp_path / "run", str(general))
    asked = asked.model_copy(update={"data": asked.data.model_copy(update={"answer_after": "A: "})})
    planned = plan_job(asked)
    assert all(row.text and not row.messages for row in replayed(planned))
    assert finetune(asked).report is not None
