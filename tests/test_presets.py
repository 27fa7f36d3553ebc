"""Public data sets by name: each is fetched as its preset says and becomes rows; what a recipe declares wins."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tunesmith.base import InputError
from tunesmith.data.presets import PRESETS
from tunesmith.data.read import Reading, content_hash, open_records
from tunesmith.data.record import RowErrors
from tunesmith.data.rows import open_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WORSE = [TURNS[0], {"role": "assistant", "content": "Go"}]
SHAREGPT = [{"from": "human", "value": "Hi", "weight": 0.0}, {"from": "gpt", "value": "Hello", "weight": 1.0}]
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}
MESSAGE = {"user_id": "u", "lang": "en", "rank": None, "deleted": False, "message_tree_id": "m", "labels": None}
TREE = [
    {"message_id": "m", "parent_id": None, "text": "Hi", "role": "prompter", **MESSAGE},
    {"message_id": "n", "parent_id": "m", "text": "Hello", "role": "assistant", **MESSAGE, "rank": 0},
]
HELD: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{**ALPACA, "text": "Below is an instruction …"}],
    "alpaca-cleaned": [ALPACA],
    "dolly": [{"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"}],
    "openassistant": TREE,
    "openassistant-2": TREE,
    "no-robots": [{"prompt": "Hi", "prompt_id": "x", "messages": TURNS, "category": "Chat"}],
    "ultrachat": [{"prompt": "Hi", "prompt_id": "x", "messages": TURNS}],
    "ultrafeedback": [
        {
            "prompt": "Hi",
            "prompt_id": "x",
            "chosen": TURNS,
            "rejected": WORSE,
            "messages": TURNS,
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        }
    ],
    "openhermes": [
        {"conversations": [{k: turn[k] for k in ("from", "value")} for turn in SHAREGPT], "source": "x", "id": None}
    ],
    "slimorca": [{"conversations": SHAREGPT}],
    "gsm8k": [{"question": "Hi", "answer": "Hello"}],
    "metamath": [{"type": "x", "query": "Hi", "original_question": "Ho", "response": "Hello"}],
    "sst2": [{"idx": 0, "sentence": "Hi", "label": 1}],
    "banking77": [{"text": "Hi", "label": 0}],
    "wikitext": [{"text": "Hi Hello"}],
}
"""One row of each set, with the columns that the set has."""

LABELS = {"sst2": ["negative", "positive"], "banking77": ["activate_my_card", "age_limit"]}


class Hub:
    """Stands for the one call through which the hub is reached."""

    def __init__(self, data: Dataset | Exception) -> None:
        self.data, self.asked = data, list[tuple[str, str | None, str]]()

    def __call__(self, path: str, *, name: str | None, split: str) -> Dataset:
        self.asked.append((path, name, split))
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


def hub(monkeypatch: pytest.MonkeyPatch, data: Dataset | Exception) -> Hub:
    found = Hub(data)
    monkeypatch.setattr("datasets.load_dataset", found)
    return found


def data_of(name: str) -> Dataset:
    data = Dataset.from_list(HELD[name])
    if name in LABELS:
        data = data.cast_column("label", ClassLabel(names=LABELS[name]))
    return data


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_becomes_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset, asked = PRESETS[name], hub(monkeypatch, data_of(name))
    errors = RowErrors()
    stream = open_rows(Reading(name), errors)
    [row] = stream
    errors.raise_any()
    assert asked.asked == [(preset.path, preset.subset, preset.split)]
    assert stream.format == preset.format
    said = LABELS[name][HELD[name][0]["label"]] if name in LABELS else "Hello"
    if name == "wikitext":
        assert row.text == "Hi Hello"
    else:
        assert [turn["content"] for turn in row.messages] == ["Hi", said] and row.references == (said,)
    assert bool(row.rejected) == (name == "ultrafeedback")
    assert row.source.file == name
    [note] = [note for note in stream.notes if "licence" in note]
    assert note == f"{name} is {preset.path}: {preset.about}; licence: {preset.licence}"
    assert preset.about and preset.licence and "/" in preset.path


def test_what_is_declared_wins_over_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, data_of("gsm8k"))
    reading = Reading("gsm8k", columns={"prompt": "answer", "completion": "question"}, subset="socratic", split="test")
    [row] = open_rows(reading, RowErrors())
    assert [turn["content"] for turn in row.messages] == ["Hello", "Hi"]
    assert asked.asked == [("openai/gsm8k", "socratic", "test")]
    hub(monkeypatch, data_of("banking77"))
    [text] = open_rows(Reading("banking77", format="text"), RowErrors())
    assert text.text == "Hi" and text.messages == ()


def test_a_file_of_the_same_name_is_the_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset.from_list([{"text": "mine"}]).save_to_disk("alpaca")
    asked = hub(monkeypatch, data_of("alpaca"))
    stream = open_rows(Reading("alpaca"), RowErrors())
    assert [row.text for row in stream] == ["mine"] and stream.format == "text"
    assert not asked.asked and not any("licence" in note for note in stream.notes)


def test_records_of_a_preset_are_read_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, data_of("gsm8k"))
    assert [record.fields for record in open_records(Reading("gsm8k"), RowErrors())] == HELD["gsm8k"]
    assert asked.asked == [("openai/gsm8k", "main", "train")]


def test_a_hub_id_is_fetched_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_dict({"text": ["a"], "label": [1]}, features=features)
    asked = hub(monkeypatch, data)
    reading = Reading("owner/name", subset="small", split="dev")
    stream = open_rows(reading, RowErrors())
    [row] = stream
    assert row.references == ("yes",) and str(row.source) == "owner/name:1" and stream.position() == (1, 1)
    assert open_rows(Reading("owner/name"), RowErrors()).format == "labelled"
    assert asked.asked == [("owner/name", "small", "dev"), ("owner/name", None, "train")]
    first = content_hash(reading)
    assert len(first) == 64 and content_hash(reading) == first
    hub(monkeypatch, data.select([0]).map(lambda row: {"text": row["text"] + "!"}))
    assert content_hash(reading) != first


@pytest.mark.parametrize(
    ("raised", "settings", "what", "fix"),
    [
        (
            ValueError("Unknown split \"train\". Should be one of ['train_sft', 'test_sft']."),
            {},
            "there is no split 'train'; it has ['train_sft', 'test_sft']",
            "set `split`",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nE"),
            {},
            "it has several configurations: ['main', 'socratic']",
            "set `subset`",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"),
            {"subset": "x"},
            "there is no configuration 'x': ['main', 'socratic']",
            "set `subset`",
        ),
        (ConnectionError("Couldn't reach it\nmore"), {}, "can be fetched: Couldn't reach it", "the network"),
        (ConnectionError(), {}, "can be fetched: ConnectionError", "the network"),
    ],
)
def test_what_the_hub_does_not_have(
    raised: Exception, settings: dict[str, Any], what: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, raised)
    with pytest.raises(InputError) as caught:
        open_rows(Reading("owner/name", **settings), RowErrors())
    assert caught.value.where == "owner/name"
    assert what in caught.value.what and "\n" not in caught.value.what and fix in (caught.value.fix or "")


def test_a_typing_error_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'openassistant'"):
        open_rows(Reading("openasistant"), RowErrors())
