"""Preference pairs and labelled words: every shape that is read, and what is wrong with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf

from conversions import ANSWER, USER, convert, refusal, turns
from tunesmith.data.read import Reading, RecordStream
from tunesmith.data.record import RowErrors
from tunesmith.data.row import Row
from tunesmith.data.rows import open_rows

SYSTEM = {"role": "system", "content": "Be"}
WORSE = {"role": "assistant", "content": "Go"}
AGAIN = {"role": "user", "content": "Again"}
HI = [("user", "Hi")]

PAIRS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "texts": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, HI),
    "texts with a system": (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "system": "Be"},
        [("system", "Be"), *HI],
    ),
    "an instruction": ({"instruction": "Hi", "output": "x", "chosen": "Hello", "rejected": "Go"}, HI),
    "an instruction with input": (
        {"instruction": "Hi", "input": "you", "chosen": "Hello", "rejected": "Go"},
        [("user", "Hi\n\nyou")],
    ),
    "turns with the prompt inside": ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, HI),
    "turns with the prompt inside and beside (UltraFeedback)": (
        {"prompt": "Hi", "prompt_id": "7", "chosen": [USER, ANSWER], "rejected": [USER, WORSE], "score_chosen": 8.0},
        HI,
    ),
    "answers as turns, the prompt as text": ({"prompt": "Hi", "chosen": [ANSWER], "rejected": [WORSE]}, HI),
    "answers as turns, the prompt as turns": (
        {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [WORSE]},
        [("system", "Be"), *HI],
    ),
    "answers as texts, the prompt as turns": ({"prompt": [USER], "chosen": "Hello", "rejected": "Go"}, HI),
    "turns inside and beside": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
        [("system", "Be"), *HI],
    ),
    "several turns": (
        {"chosen": [USER, WORSE, AGAIN, ANSWER], "rejected": [USER, WORSE, AGAIN, WORSE]},
        [*HI, ("assistant", "Go"), ("user", "Again")],
    ),
}


def rejected(row: Row) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in row.rejected]


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("declared", ["auto", "preference"])
def test_pairs_of_every_shape(case: str, declared: str) -> None:
    fields, prompt = PAIRS[case]
    name, [row] = convert(fields, format=declared)
    assert name == "preference"
    assert turns(row) == [*prompt, ("assistant", "Hello")]
    assert rejected(row) == [*prompt, ("assistant", "Go")]
    assert row.references == ("Hello",)


def test_a_system_turn_is_put_before_both() -> None:
    _, [row] = convert({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, system="Be brief")
    assert turns(row)[0] == rejected(row)[0] == ("system", "Be brief")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"chosen": "Hello", "rejected": "Go"}, "there is no 'prompt'"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "there is no 'prompt'"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": 5.5j}, "'rejected' must be text"),
        ({"prompt": "Hi", "chosen": [], "rejected": "Go"}, "'chosen' must be a list of turns, found an empty list"),
        ({"chosen": [USER, ANSWER], "rejected": [AGAIN, WORSE]}, "differ before the last turn (turn 1)"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, AGAIN, WORSE]},
            "'chosen' has 2 turns and 'rejected' 4",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "there is no assistant turn"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER, AGAIN], "rejected": [USER, WORSE]}, "the last turn is 'user'"),
        (
            {"prompt": [AGAIN], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
            "'chosen' is a conversation that does not begin with the turns of 'prompt'",
        ),
    ],
)
def test_pairs_that_are_none(fields: dict[str, Any], what: str) -> None:
    error = refusal(fields)
    assert error.what.startswith("rows.jsonl:1: ") and what in error.what
    assert "'preference'" in (error.fix or "")


def test_columns_of_pairs_are_mapped() -> None:
    fields = {"q": "Hi", "good": "Hello", "bad": "Go"}
    name, [row] = convert(fields, columns={"prompt": "Say: {q}", "chosen": "good", "rejected": "bad"})
    assert name == "preference" and turns(row)[0] == ("user", "Say: Hi") and rejected(row)[1] == ("assistant", "Go")


@pytest.mark.parametrize("column", ["labels", "ner_tags", "tags", "pos_tags"])
def test_words_with_labels(column: str) -> None:
    name, rows = convert({"tokens": ["Ada", "sings"], column: ["PER", "O"]}, {"tokens": ["Hi"], column: [3]})
    assert name == "token-labels"
    assert [(row.words, row.labels) for row in rows] == [(("Ada", "sings"), ("PER", "O")), (("Hi",), ("3",))]
    assert rows[0].messages == () and rows[0].text == ""
    _, [mapped] = convert({"w": ["Ada"], "t": ["PER"]}, columns={"tokens": "w", "labels": "t"})
    assert (mapped.words, mapped.labels) == (("Ada",), ("PER",))


@pytest.mark.parametrize("kind", ["directory", "parquet"])
def test_numbers_of_labels_are_read_by_their_names(kind: str, tmp_path: Path) -> None:
    features = Features({"tokens": ListOf(Value("string")), "ner_tags": ListOf(ClassLabel(names=["O", "B-PER"]))})
    data = Dataset.from_dict({"tokens": [["Ada", "sings"], ["x"]], "ner_tags": [[1, 0], [-1]]}, features=features)
    path = tmp_path / ("rows.parquet" if kind == "parquet" else "saved")
    data.to_parquet(str(path)) if kind == "parquet" else data.save_to_disk(str(path))
    errors = RowErrors()
    [row] = open_rows(Reading(str(path)), errors)
    assert row.labels == ("B-PER", "O")
    assert errors.shown == [f"{path}:2: label 1 of 'ner_tags' is missing or a number without a name"]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, "there are 2 'tokens' and 1 'labels'; every word needs one label"),
        ({"tokens": "a b", "labels": ["O"]}, "'tokens' must be a list with an item for each word, found str"),
        ({"tokens": ["a"], "labels": None}, "'labels' must be a list with an item for each word, found nothing"),
        ({"tokens": [], "labels": []}, "found an empty list"),
        ({"tokens": [1], "labels": ["O"]}, "word 1 of 'tokens' must be text, found int"),
        ({"tokens": ["a"], "labels": [True]}, "'labels' must be text, found True"),
        ({"tokens": ["a", "\0"], "labels": ["O", "O"]}, "a NUL character"),
    ],
)
def test_words_whose_labels_do_not_fit(fields: dict[str, Any], what: str) -> None:
    error = refusal(fields)
    assert error.what.startswith("rows.jsonl:1: ") and what in error.what


def test_a_stream_of_records_needs_nothing_but_records() -> None:
    assert RecordStream([]).position() == (0, None)
