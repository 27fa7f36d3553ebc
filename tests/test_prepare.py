"""Between files and examples nothing is lost in silence: every row is used, or counted with its targets, or refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import build_tokenizer, colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.data.clean import CUT
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.spec import DataSpec, SourceSpec
from tunesmith.models.templates import resolve_template


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Job:
    """Prepares data as a run would, from rows that are written to files on the way."""

    def __init__(self, of: PreTrainedTokenizerFast, directory: Path) -> None:
        self.of, self.directory = of, directory

    def file(self, name: str, rows: list[dict[str, Any]]) -> str:
        return str(write_jsonl(self.directory / f"{name}.jsonl", rows))

    def __call__(
        self,
        rows: list[dict[str, Any]] | None = None,
        *,
        limit: int = 256,
        seed: int = 0,
        proof: bool = False,
        **data: Any,
    ) -> Prepared:
        if rows is not None:
            data["train"] = self.file("train", rows)
        spec = DataSpec(**data)
        template = resolve_template(spec.template, self.of)
        renderer = Renderer(template, self.of, spec.train_on, {int(self.of.eos_token_id)})
        return prepare(spec, renderer, model_limit=limit, seed=seed, wants_test=proof, progress=lambda *_: None)

    def refusal(self, *rows: Any, **settings: Any) -> InputError:
        with pytest.raises(InputError) as caught:
            self(*rows, **settings)
        assert caught.value.fix, "every error says what to do"
        return caught.value


@pytest.fixture
def job(of: PreTrainedTokenizerFast, tmp_path: Path) -> Job:
    return Job(of, tmp_path)


def said(items: list[Rendered]) -> list[str]:
    return [item.row.messages[-2]["content"] for item in items]


def lost(prepared: Prepared) -> dict[str, tuple[int, int, int]]:
    """For each reason: rows, target tokens, and the line of the first."""
    return {item.reason: (item.rows, item.target_tokens, int(item.example.split(":")[-1])) for item in prepared.lost}


def targets(prepared: Prepared) -> int:
    return sum(item.example.targets for item in prepared.train)


# --- rows that cannot be used as they are ---


def test_duplicates(job: Job) -> None:
    rows = colour_rows(6)
    twice = [*rows, rows[2], {**rows[3], "completion": "OTHER"}, rows[2]]
    dropped = job(twice)
    assert said(dropped.train) == [row["prompt"] for row in [*rows, rows[3]]]
    once = job([rows[2]])
    assert lost(dropped) == {"duplicate": (2, 2 * targets(once), 7)}
    manifest = dropped.manifest()
    assert (manifest["rows_used"], manifest["rows_lost"]) == (7, 2)
    assert manifest["target_tokens_used"] == targets(dropped)
    assert manifest["target_tokens_lost"] == 2 * targets(once)
    assert len(job(twice, duplicates="keep").train) == 9
    error = job.refusal(twice, duplicates="error")
    assert "train.jsonl:7: the same row as" in error.what and "train.jsonl:3" in error.what
    assert "2 rows are wrong" in error.what and "data.duplicates" in (error.fix or "")


def test_duplicates_do_not_swell_the_held_out_rows(job: Job) -> None:
    """A row that stands ten times would be judged ten times."""
    rows = colour_rows(40)
    prepared = job([*rows, *[rows[at % 5] for at in range(50)]], proof=True)
    assert len(prepared.test) == 13 and len({item.row.key for item in prepared.test}) == 13
    assert len(prepared.train) == 27 and lost(prepared)["duplicate"][0] == 50


def test_overlap_with_held_out_rows(job: Job) -> None:
    rows = colour_rows(30)
    held = [{**rows[4], "prompt": f"  {rows[4]['prompt'].upper()} "}, *colour_rows(5, start=500)]
    test, validation = job.file("test", held), job.file("validation", rows[7:9])
    prepared = job(rows, test=test, validation=validation)
    assert said(prepared.train) == [row["prompt"] for at, row in enumerate(rows) if at not in (4, 7, 8)]
    assert lost(prepared)["stands in the held-out rows"][::2] == (3, 5)
    assert len(job(rows, test=test, validation=validation, overlap="keep").train) == 30
    error = job.refusal(rows, test=test, validation=validation, overlap="error")
    assert "train.jsonl:5: the same prompt as" in error.what and "test.jsonl:1" in error.what
    error = job.refusal(rows, test=job.file("same", rows))
    assert error.where == "data.overlap" and "every training row also stands" in error.what


def test_rows_that_choose_the_checkpoint_are_not_those_that_judge_it(job: Job) -> None:
    rows, held = colour_rows(20), colour_rows(8, start=300)
    test = job.file("test", held[:6])
    prepared = job(rows, test=test, validation=job.file("validation", held[4:]))
    assert said(prepared.validation) == [row["prompt"] for row in held[6:]] and len(prepared.test) == 6
    assert any("2 rows of validation were left out" in note for note in prepared.notes)
    error = job.refusal(rows, test=test, validation=test)
    assert error.where == "data.validation" and "every validation row also stands in the test" in error.what
    error = job.refusal(rows, test=test, validation=test, overlap="error")
    assert "which is a test row" in error.what
    assert len(job(rows, test=test, validation=test, overlap="keep").validation) == 6


def test_empty_answers_and_prompts(job: Job) -> None:
    rows = colour_rows(4)
    bad = [
        {"prompt": "a", "completion": " \n"},
        {"prompt": "b", "completion": None},
        {"prompt": " ", "completion": "c"},
    ]
    error = job.refusal([*rows, *bad])
    shown = error.what.splitlines()
    assert [line.split(": ", 1)[1] for line in shown[:3]] == [
        "the answer is empty",
        "the answer is empty",
        "the prompt is empty",
    ]
    assert shown[0].endswith("train.jsonl:5: the answer is empty") and "data.empty: drop" in (error.fix or "")
    prepared = job([*rows, *bad], empty="drop")
    assert len(prepared.train) == 4 and lost(prepared)["empty"][::2] == (3, 5)
    error = job.refusal(bad, empty="drop")
    assert error.what == "no training row is left"
    texts = [{"text": "Once"}, {"text": "  "}]
    assert "the text is empty" in job.refusal(texts).what
    assert len(job(texts, empty="drop").train) == 1


def test_empty_held_out_rows_are_not_passed_over(job: Job) -> None:
    rows = colour_rows(4)
    test = job.file("test", [*colour_rows(2, start=50), {"prompt": "a", "completion": ""}])
    assert "test.jsonl:3: the answer is empty" in job.refusal(rows, test=test).what
    prepared = job(rows, test=test, empty="drop")
    assert len(prepared.test) == 2
    [note] = prepared.notes
    assert note.startswith(f"1 row of {test} was left out: empty") and note.endswith("test.jsonl:3")
    only = job.file("only", [{"prompt": "a", "completion": ""}])
    assert job.refusal(rows, test=only, empty="drop").what == "every row is empty"


LONG = {"prompt": "Say long", "completion": "LONG " * 30}


def test_overlong_rows(job: Job) -> None:
    rows = [*colour_rows(3), LONG, {"prompt": "Say " + "very " * 50, "completion": "short"}]
    whole = job(rows)
    lengths = [len(item.example) for item in whole.train]
    assert whole.max_length == max(lengths) and not whole.lost
    limit = lengths[3] - 10
    assert lengths[4] > limit > max(lengths[:3])
    error = job.refusal(rows, max_length=limit)
    assert f"train.jsonl:4: {lengths[3]} tokens, 10 over the limit of {limit}" in error.what
    assert "raise data.max_length, or set data.overlong" in (error.fix or "")
    dropped = job(rows, max_length=limit, overlong="drop")
    assert len(dropped.train) == 3
    assert lost(dropped) == {"overlong": (2, whole.train[3].example.targets + whole.train[4].example.targets, 4)}
    cut = job(rows, max_length=limit, overlong="truncate")
    assert [len(item.example) for item in cut.train] == [*lengths[:3], limit]
    assert lost(cut) == {
        CUT: (0, whole.train[3].example.targets - cut.train[3].example.targets, 4),
        "no answer left within max_length": (1, whole.train[4].example.targets, 5),
    }
    assert cut.manifest()["rows_lost"] == 1
    shortened = cut.train[3]
    assert shortened.prompt_ids == whole.train[3].prompt_ids
    full = whole.train[3].example.token_ids.tolist()
    assert [*shortened.example.token_ids.tolist(), *shortened.cut_ids] == full


def test_the_limit_is_never_more_than_the_model_has(job: Job) -> None:
    assert "more than the model's 16 positions" in job.refusal(colour_rows(3), limit=16, max_length=17).what
    error = job.refusal([*colour_rows(3), LONG], limit=60)
    assert error.fix == "the model has no more positions: set data.overlong: drop or truncate"
    assert job([*colour_rows(3), LONG], limit=60, overlong="drop").max_length == 60


def test_held_out_answers_are_never_cut(job: Job) -> None:
    test = job.file("test", [*colour_rows(2, start=90), LONG])
    error = job.refusal(colour_rows(4), test=test, limit=60)
    assert "test.jsonl:3: " in error.what and "do not fit into the model's 60 positions" in error.what
    assert "data.overlong: drop" in (error.fix or "")
    for overlong in ("drop", "truncate"):
        prepared = job(colour_rows(4), test=test, limit=60, overlong=overlong)
        assert len(prepared.test) == 2 and any("too long for the model" in note for note in prepared.notes)
    assert (
        "no test row fits" in job.refusal(colour_rows(4), test=job.file("long", [LONG]), limit=60, overlong="drop").what
    )
    texts = [{"text": f"{at} " + "word " * 90} for at in range(4)]
    raw = job(texts, test=job.file("texts", [{"text": "other " * 90}]), limit=60, overlong="truncate")
    assert [len(item.example) for item in raw.test] == [60]


def test_rows_that_train_nothing(job: Job) -> None:
    def turns(weight: int) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": f"Say {weight}"},
                {"role": "assistant", "content": "Yes", "weight": weight},
            ]
        }

    prepared = job([turns(0), turns(1)])
    assert len(prepared.train) == 1 and lost(prepared) == {"no answer with a weight": (1, 0, 1)}
    assert "nothing would be trained on" in job.refusal([turns(0)]).what
    error = job.refusal([LONG], max_length=12, overlong="truncate")
    assert error.what == "no training row is left"


# --- held-out rows ---


def test_fractions_and_their_limits(job: Job) -> None:
    rows = colour_rows(50)
    prepared = job(rows, test=0.2, validation=0.25, seed=3)
    assert [len(items) for items in (prepared.train, prepared.validation, prepared.test)] == [30, 10, 10]
    everything = [*prepared.train, *prepared.validation, *prepared.test]
    assert sorted(said(everything)) == sorted(row["prompt"] for row in rows)
    assert prepared.test_from.startswith("20% of the training rows")
    again = job(rows[::-1], test=0.2, validation=0.25, seed=3)
    assert set(said(again.test)) == set(said(prepared.test))
    for share in (0.0, 1.0, 1.5, -0.1):
        assert job.refusal(rows, test=share).where == "data.test"
        assert job.refusal(rows, validation=share).where == "data.validation"


def test_tiny_data_sets(job: Job) -> None:
    two = job(colour_rows(2), proof=True)
    assert (len(two.train), len(two.test)) == (1, 1)
    error = job.refusal(colour_rows(1), proof=True)
    assert error.what == "1 row is too few to hold any back" and error.where == "data.test"
    assert "evaluate: off" in (error.fix or "")
    error = job.refusal(colour_rows(2), proof=True, validation=0.5)
    assert error.where == "data.validation"
    same = [{"prompt": "Write a poem", "completion": f"Poem {at}"} for at in range(9)]
    assert "9 rows with one and the same prompt" in job.refusal(same, proof=True).what
    assert len(job(colour_rows(1)).train) == 1


def test_held_out_files_are_read_like_the_training_file(job: Job) -> None:
    papers = [{"document": f"Paper {at}", "summaries": [f"S{at}", "T"]} for at in range(9)]
    columns = {"prompt": "Summarise: {document}", "completion": "summaries"}
    test = job.file("test", [{"document": "Other", "summaries": ["One", "Two"]}])
    train = job.file("papers", papers)
    for data in ({"train": train, "columns": columns}, {"train": [SourceSpec(path=train, columns=columns)]}):
        prepared = job(**data, test=test)
        assert said(prepared.test) == ["Summarise: Other"]
        assert prepared.test[0].row.references == ("One", "Two")
    assert [source["role"] for source in prepared.sources] == ["train", "test"]
    assert all(len(source["sha256"]) == 64 and source["format"] == "prompt-completion" for source in prepared.sources)


def test_answers_after_a_marker_and_numbers_of_classes(job: Job) -> None:
    texts = [{"text": f"table: {at}\nQ: Who?\nA: SELECT {at}"} for at in range(4)]
    prepared = job(texts, answer_after="\nA: ")
    assert [item.row.references for item in prepared.train] == [(f"SELECT {at}",) for at in range(4)]
    labels = job([{"text": "Great", "label": 1}, {"text": "Bad", "label": 0}])
    assert [item.row.references for item in labels.train] == [("1",), ("0",)]


# --- the order of rows ---


def test_sources_with_weights(job: Job) -> None:
    one, two = job.file("one", colour_rows(30)), job.file("two", colour_rows(10, start=400))
    prepared = job(train=[SourceSpec(path=one, weight=1), SourceSpec(path=two, weight=3)])
    drawn = Counter(prepared.train[at].row.source.file for at in prepared.order.rows(0, 40))
    assert drawn == {one: 10, two: 30}
    error = job.refusal(train=[SourceSpec(path=one, weight=1), SourceSpec(path=two)])
    assert "some sources have a weight and some have none" in error.what
    error = job.refusal(train=[SourceSpec(path=one, weight=1), SourceSpec(path=one, weight=1)])
    assert f"no row of {one} is left" in error.what and error.where == "data.train.1.weight"
    error = job.refusal(train=[SourceSpec(path=one, weight=1), SourceSpec(path=two, weight=0.001)])
    assert error.where == "data.train.1.weight" and "none of an epoch's 40 rows" in error.what
    assert job.refusal(train=[]).where == "data.train"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    duplicates=st.sampled_from(["drop", "keep"]),
    overlong=st.sampled_from(["drop", "truncate"]),
    test=st.sampled_from([0.2, 0.5]),
)
def test_every_row_is_used_held_out_or_counted(
    job: Job, data: st.DataObject, duplicates: str, overlong: str, test: float
) -> None:
    base = colour_rows(8)
    extra = data.draw(st.lists(st.sampled_from([*base, LONG, {"prompt": "x", "completion": " "}]), max_size=8))
    rows = [*base, *extra]
    prepared = job(rows, duplicates=duplicates, overlong=overlong, empty="drop", test=test, max_length=60)
    manifest = prepared.manifest()
    counted = len(prepared.train) + len(prepared.test) + manifest["rows_lost"]
    assert counted == len(rows)
    assert manifest["rows_lost"] == sum(item["rows"] for item in manifest["lost"])
    assert manifest["target_tokens_used"] == targets(prepared) > 0
    assert json.loads(json.dumps(manifest)) == manifest
    for item in prepared.train:
        ids, weights = item.example.token_ids.tolist(), item.example.tensors["target_weights"].tolist()
        assert len(ids) <= 60 and weights[0] == 0
        start = len(item.prompt_ids)
        assert not any(weights[:start]) and weights[start] == 1
        answer = job.of.decode([token for token, weight in zip(ids, weights, strict=True) if weight])
        whole = item.row.messages[-1]["content"] + "<|im_end|>"
        assert answer == whole if not item.cut_ids else whole.startswith(answer)
