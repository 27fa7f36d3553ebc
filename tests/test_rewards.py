"""Verifiers and the other rewards: what answers are worth, and what is said of those that cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from conftest import write_jsonl
from tunesmith.base import InputError, Source
from tunesmith.batch import pack
from tunesmith.data.row import Row
from tunesmith.methods import Full, Lora
from tunesmith.metrics.verifiers import has_keys, has_number, is_exact, last_number
from tunesmith.objectives import Grpo, Reward
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.labeller import Labeller
from tunesmith.pipeline.loaded import load, load_labeller
from tunesmith.pipeline.planning import plan_job
from tunesmith.pipeline.rewards import Scorer
from tunesmith.recipe_file import check_recipe


def row(prompt: str = "How many?", answer: str = "") -> Row:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Row(Source("rows.jsonl", 1), turns, references=(answer,))


def scorer(*rewards: Any) -> Scorer:
    return Scorer.of(Grpo(reward=list(rewards)).reward)


def worth(reward: Any, answer: str, reference: str = "") -> float:
    [found] = scorer(reward)([row(answer=reference)], [answer])
    return found


def test_numbers_are_the_same_however_they_are_written() -> None:
    for text in ("so 1,234", "1234", "It is 1234.0.", "12 and then 1234", "1.234e3"):
        assert has_number(text, ["#### 1,234"]) == 1.0, text
    for text in ("1234 or 1235", "none", "", "-1234"):
        assert has_number(text, ["1234"]) == 0.0, text
    assert last_number("0.10") == last_number(".1") and last_number("no") is None
    assert has_number("no number", ["nor here"]) == 0.0


def test_exact_is_exact_but_for_the_ends() -> None:
    assert is_exact(" yes\n", ["no", "yes"]) == 1.0
    assert is_exact("Yes", ["yes"]) == 0.0 and is_exact("yes", []) == 0.0


def test_json_is_the_whole_answer() -> None:
    assert has_keys('{"a": 1, "b": null}', ["a", "b"]) == 1.0
    assert has_keys('{"a": 1}', ["a", "b"]) == 0.5
    assert has_keys("[1, 2]", []) == 1.0 and has_keys('["a"]', ["a"]) == 0.0
    for text in ('Here: {"a": 1}', '```json\n{"a": 1}\n```', "", "NaN", "{'a': 1}", "[" * 100_000):
        assert has_keys(text, []) == 0.0, text[:20]


def test_each_reward_through_the_recipe() -> None:
    assert worth("exact", "4 ", "4") == 1.0
    assert worth("number", "The sum is 4", "4") == 1.0
    assert worth({"kind": "regex", "pattern": r"^\d+$"}, "42") == 1.0
    assert worth({"kind": "regex", "pattern": r"^\d+$"}, "is 42") == 0.0
    assert worth({"kind": "json", "keys": ["x"]}, '{"x": 1}') == 1.0


def test_several_rewards_add_up_by_their_weights() -> None:
    both = scorer({"kind": "json", "weight": 0.5}, {"kind": "regex", "pattern": "x", "weight": -2})
    assert both([row(), row()], ['{"a": 1}', '{"x": 1}']) == [0.5, -1.5]


def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(prompt, answer, references):\n    return len(prompt) + len(answer) * 10 + len(references)"
    )
    own = scorer({"kind": "function", "path": f"{file}:score"})
    assert own([row("ab", "four")], ["xyz"]) == [2 + 30 + 1]
    assert own([row("ab", "")], ["xyz"]) == [32]
    assert len(own.record[f"{file}:score"]) == 64


@pytest.mark.parametrize(
    ("code", "named", "what"),
    [
        ("def score(p, a, r): return 1", "other", "there is no function 'other'"),
        ("oops(", "score", "cannot be run"),
        ("def score(p, a, r): raise KeyError('x')", "score", "raised KeyError"),
        ("def score(p, a, r): return float('nan')", "score", "no finite number"),
        ("def score(p, a, r): return 'good'", "score", "gave 'good'"),
        ("def score(p): return 1", "score", "raised TypeError"),
    ],
)
def test_a_function_that_gives_no_number_is_named(code: str, named: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(InputError, match=what) as told:
        worth({"kind": "function", "path": f"{tmp_path / 'mine.py'}:{named}"}, "answer")
    assert "mine.py" in str(told.value)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        scorer({"kind": "function", "path": str(tmp_path / "none.py") + ":score"})
    with pytest.raises(InputError, match="cannot be read"):
        scorer({"kind": "json", "schema_file": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "function", "path": "score"}, "does not name a function"),
        ({"kind": "json", "keys": ["a"], "schema_file": "x.json"}, "use keys or schema_file"),
        ({"kind": "exact", "weight": float("inf")}, "finite"),
        ([], "at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(reward: Any, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Grpo(reward=reward)


def test_a_schema_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "required": ["a"]}')
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.setitem(sys.modules, "jsonschema.validators", None)
    with pytest.raises(InputError, match="jsonschema, which is not installed"):
        scorer({"kind": "json", "schema_file": str(tmp_path / "schema.json")})


def test_a_schema_is_kept_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package where it is installed, else with one of its shape."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["a"]}')
    try:
        import jsonschema  # noqa: F401  # pyright: ignore[reportMissingImports,reportMissingModuleSource]
    except ImportError:

        class Validator:
            def __init__(self, schema: Any) -> None:
                self.schema = schema

            @staticmethod
            def check_schema(schema: Any) -> None:
                if not isinstance(schema, dict):
                    raise ValueError("a schema is an object")

            def is_valid(self, value: Any) -> bool:
                return isinstance(value, dict) and all(key in value for key in self.schema["required"])

        modules = {
            "jsonschema": SimpleNamespace(),
            "jsonschema.validators": SimpleNamespace(validator_for=lambda schema: Validator),
            "jsonschema.exceptions": SimpleNamespace(SchemaError=KeyError),
        }
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    reward = {"kind": "json", "schema_file": str(schema)}
    assert [worth(reward, text) for text in ('{"a": 1}', '{"b": 1}', "nothing")] == [1.0, 0.0, 0.0]
    assert len(scorer(reward).record[str(schema)]) == 64
    schema.write_text("not json")
    with pytest.raises(InputError, match="no JSON schema can be read"):
        scorer(reward)


@pytest.fixture(scope="module")
def reward_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that gives texts a number: an adapter over the model that is trained later."""
    root = tmp_path_factory.mktemp("reward")
    rows = [{"text": f"Say word {at}", "label": at % 7} for at in range(40)]
    values = {
        "model": str(tiny_model),
        "data": {"train": str(write_jsonl(root / "rows.jsonl", rows))},
        "method": {"kind": "lora", "rank": 2},
        "objective": "regress",
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32"},
        "evaluate": "off",
        "output": str(root / "run"),
    }
    return finetune(check_recipe(values, "test")).path


def test_a_reward_model_says_what_its_labeller_says(reward_run: Path) -> None:
    scores = Scorer.of(Grpo(reward=[{"kind": "model", "path": str(reward_run)}]).reward, "fp32")
    found = scores([row("Say one"), row("Say two")], ["ONE", "TWO and more"])
    labeller = load_labeller(str(reward_run), dtype="fp32")
    assert isinstance(labeller, Labeller)
    expected = [float(said.answer) for said in labeller.say(["Say one\n\nONE", "Say two\n\nTWO and more"])]
    assert found == pytest.approx(expected, rel=1e-4) and found[0] != found[1]
    assert scores([], []) == []


def test_weights_in_common_are_held_once(reward_run: Path, tiny_model: Path) -> None:
    scores = Scorer.of(Grpo(reward=[{"kind": "model", "path": str(reward_run)}]).reward, "fp32")
    before = scores([row("Say one")], ["ONE"])
    trained = load(tiny_model, dtype="fp32")
    Lora(rank=2).adapt(trained)
    shared = scores.share(trained)
    assert shared == sum(weight.numel() for weight in load(tiny_model, dtype="fp32").parameters())
    assert scores([row("Say one")], ["ONE"]) == before
    labeller = scores.models[0]._labeller
    assert labeller is not None
    places = {weight.data_ptr() for weight in trained.parameters()}
    own = [weight for weight in labeller.model.parameters() if weight.data_ptr() not in places]
    assert sum(weight.numel() for weight in own) < 0.2 * shared, "only its adapter and its head"


def test_weights_that_are_trained_are_not_shared(reward_run: Path, tiny_model: Path) -> None:
    scores = Scorer.of(Grpo(reward=[{"kind": "model", "path": str(reward_run)}]).reward, "fp32")
    trained = load(tiny_model, dtype="fp32")
    Full().adapt(trained)
    assert scores.share(trained) == 0


def test_a_model_that_gives_no_number_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="gives no single number"):
        scorer({"kind": "model", "path": str(tiny_model)})


def test_a_reward_model_of_preferences_says_what_it_was_trained_to_say(tiny_model: Path, tmp_path: Path) -> None:
    """The number of an answer is read where training read it: at its last token, behind the prompt's conversation."""
    pairs = [{"prompt": f"Say {at}", "chosen": f"YES {at}", "rejected": f"no {at}"} for at in range(40)]
    values = {
        "model": str(tiny_model),
        "data": {"train": str(write_jsonl(tmp_path / "pairs.jsonl", pairs))},
        "method": {"kind": "lora", "rank": 2},
        "objective": "reward",
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32"},
        "evaluate": "off",
        "output": str(tmp_path / "run"),
    }
    recipe = check_recipe(values, "test")
    run = finetune(recipe)
    scores = Scorer.of(Grpo(reward=[{"kind": "model", "path": str(run.path)}]).reward, "fp32")
    planned = plan_job(recipe)
    assert planned.prepared is not None and isinstance(planned.objective, Reward)
    item = planned.prepared.train[0]
    found = scores([item.row, item.row], [item.row.messages[-1]["content"], item.row.rejected[-1]["content"]])
    labeller = load_labeller(str(run.path), dtype="fp32")
    assert labeller is not None
    with torch.no_grad():
        expected = planned.objective.outputs(labeller.model.eval(), pack([item.example]))[:, 0]
    assert found == pytest.approx(expected.tolist(), rel=1e-4) and found[0] != found[1]
