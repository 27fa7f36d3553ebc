"""The bad inputs that other trainers take in silence: here each is refused, or handled and said, by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import build_tokenizer, colour_rows, write_jsonl
from tunesmith.cli import main
from tunesmith.models.templates import NAMED_TEMPLATES

GOOD = colour_rows(40)
UNENDED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
HEADLESS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
DOUBLED = "{{ bos_token }}{{ bos_token }}" + NAMED_TEMPLATES["chatml"]
REWRITTEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nSurely: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {"good": tiny_model}
    for name, template in {"bare": None, "unended": UNENDED, "headless": HEADLESS, "rewritten": REWRITTEN}.items():
        found[name] = root / name
        shutil.copytree(tiny_model, found[name])
        for old in found[name].glob("chat_template*"):
            old.unlink()
        build_tokenizer(found[name], template)
    found["doubled"] = root / "doubled"
    shutil.copytree(tiny_model, found["doubled"])
    build_tokenizer(found["doubled"], DOUBLED).save_pretrained(found["doubled"], bos_token="<|endoftext|>")
    return found


class Case:
    """One user with one recipe in one directory."""

    def __init__(self, root: Path, models: dict[str, Path], captured: pytest.CaptureFixture[str]) -> None:
        self.root, self.models, self.captured = root, models, captured

    def recipe(self, rows: list[dict[str, Any]] | str | bytes, *, model: str = "good", **data: Any) -> dict[str, Any]:
        if isinstance(rows, list):
            write_jsonl(self.root / "rows.jsonl", rows)
        else:
            (self.root / "rows.jsonl").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return {
            "model": str(self.models[model]),
            "data": {"train": "rows.jsonl", **data},
            "train": {"steps": 3, "batch_size": 4, "dtype": "fp32", "learning_rate": 0.01},
            "evaluate": "off",
            "output": "runs/one",
        }

    def train(self, recipe: dict[str, Any], *more: str) -> tuple[int, str]:
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return self.run("train", "recipe.yaml", *more)

    def run(self, *arguments: str) -> tuple[int, str]:
        """The command line inside this process, which saves the seconds that importing torch takes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setattr("sys.argv", ["tunesmith", *arguments])
            patch.setenv("COLUMNS", "160")
            with pytest.raises(SystemExit) as left:
                main()
        code = left.value.code
        captured = self.captured.readouterr()
        return code if isinstance(code, int) else 0, captured.err + captured.out

    def refused(self, recipe: dict[str, Any], *said: str) -> None:
        code, text = self.train(recipe)
        assert code == 2, text
        for part in said:
            assert part in text
        assert not (self.root / "runs").exists(), "nothing half-written is left"


@pytest.fixture
def case(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, models, capsys)


def test_1_every_answer_empty(case: Case) -> None:
    rows = [{**row, "completion": " "} for row in GOOD]
    case.refused(case.recipe(rows), "rows.jsonl:1: the answer is empty", "40 rows are wrong", "data.empty: drop")


def test_2_answers_that_the_length_limit_would_cut_away(case: Case) -> None:
    long = [{"prompt": "Say " + "red blue " * 20, "completion": "RED"} for _ in range(3)]
    case.refused(case.recipe([*GOOD, *long], max_length=40, duplicates="keep"), "over the limit of 40", "data.overlong")
    code, text = case.train(case.recipe([*GOOD, *long], max_length=40, duplicates="keep", overlong="truncate"))
    assert code == 0, text
    manifest = json.loads((case.root / "runs/one/data.json").read_text())
    lost = {item["reason"]: item["rows"] for item in manifest["lost"]}
    assert lost == {"no answer left within max_length": 3} and manifest["rows_used"] == 40


def test_3_an_end_of_turn_that_is_never_written(case: Case) -> None:
    case.refused(case.recipe(GOOD, model="unended"), "never closes an answer", "learn to stop", "chatml")


def test_4_roles_out_of_order(case: Case) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    case.refused(case.recipe([{"messages": turns}]), "rows.jsonl:1", "two user turns in a row (turns 1 and 2)")


def test_5_a_conversation_that_ends_with_the_user(case: Case) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    case.refused(case.recipe([{"messages": turns}]), "rows.jsonl:1", "must end with the assistant's answer")


def test_6_duplicates(case: Case) -> None:
    code, text = case.train(case.recipe([*GOOD, *GOOD[:7]]))
    assert code == 0 and "40 rows" in text
    [lost] = json.loads((case.root / "runs/one/data.json").read_text())["lost"]
    assert (lost["reason"], lost["rows"], lost["example"]) == ("duplicate", 7, "rows.jsonl:41")
    assert lost["target_tokens"] > 0


def test_7_test_rows_inside_the_training_file(case: Case) -> None:
    write_jsonl(case.root / "test.jsonl", [{**row, "prompt": row["prompt"].upper()} for row in GOOD[:5]])
    code, _ = case.train(case.recipe(GOOD, test="test.jsonl"))
    manifest = json.loads((case.root / "runs/one/data.json").read_text())
    assert code == 0 and manifest["rows_used"] == 35
    assert [(item["reason"], item["rows"]) for item in manifest["lost"]] == [("stands in the held-out rows", 5)]


def test_8_to_11_an_output_directory_in_use(case: Case) -> None:
    recipe = case.recipe(GOOD)
    assert case.train(recipe)[0] == 0
    adapter = (case.root / "runs/one/adapter/adapter_model.safetensors").read_bytes()
    for changed in (recipe, {**recipe, "train": {**recipe["train"], "learning_rate": 0.5}}):
        code, text = case.train(changed)
        assert code == 2 and "runs/one" in text.replace("\\", "/") and "--resume" in text
    code, text = case.train({**recipe, "train": {**recipe["train"], "steps": 9}}, "--resume")
    assert code == 2 and "train.steps" in text and "9" in text, "a finished run is not trained on with other settings"
    assert (case.root / "runs/one/adapter/adapter_model.safetensors").read_bytes() == adapter
    (case.root / "mine").mkdir()
    (case.root / "mine/notes.txt").write_text("mine")
    code, text = case.train({**recipe, "output": "mine"})
    assert code == 2 and (case.root / "mine/notes.txt").read_text() == "mine"


def test_12_divergence_is_not_a_success(case: Case) -> None:
    recipe = case.recipe(GOOD)
    recipe["train"] |= {"learning_rate": 1e30, "steps": 12, "warmup": 0}
    code, text = case.train(recipe)
    assert code == 1 and "times in a row" in text and "train.learning_rate" in text


def test_13_the_prompt_is_not_trained_on(case: Case) -> None:
    recipe = case.recipe(GOOD)
    (case.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, shown = case.run("data", "show", "recipe.yaml", "-n", "1")
    trained = shown.partition("⟦")[2] if "⟦trained⟧" not in shown else shown.partition("⟦trained⟧")[2].partition("⟦")[2]
    answer = GOOD[0]["completion"]
    assert trained.partition("⟧")[0] == f"{answer}<|im_end|>", "the answer and its end-of-turn, and nothing else"


def test_14_the_header_of_the_answer_is_not_trained_on(case: Case) -> None:
    case.refused(case.recipe(GOOD, model="headless"), "header of the answer", "add_generation_prompt")


def test_15_training_and_inference_that_render_differently(case: Case) -> None:
    case.refused(case.recipe(GOOD, model="rewritten"), "for training and for generation in two ways")


def test_16_a_begin_of_text_that_stands_twice(case: Case) -> None:
    case.refused(case.recipe(GOOD, model="doubled"), "begin-of-text", "stands twice")


def test_17_a_model_without_a_template(case: Case) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    case.refused(case.recipe([{"messages": turns}], model="bare"), "no chat template", "chatml", "llama-3", "plain")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": 1}\n', ["rows.jsonl:2", "rows.jsonl:3", "2 rows"]),
        (b'{"prompt": "a", "completion": "b\xff"}\n', ["rows.jsonl:1", "not UTF-8"]),
        ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), ["rows.jsonl:1", "UTF-16"]),
        (b"", ["rows.jsonl", "no rows"]),
        (b'{"prompt": "a", "completion": "b"}\n{"messages": []}\n', ["rows.jsonl:2", "mixed formats"]),
        (b'{"question": "a", "answer": "b"}\n', ["no known format", "data.columns"]),
        (b'{"prompt": "a", "completion": ["b", 3.5, {}]}\n', ["rows.jsonl:1", "completion"]),
    ],
)
def test_18_files_that_are_broken(case: Case, content: bytes, said: list[str]) -> None:
    case.refused(case.recipe(content), *said)
