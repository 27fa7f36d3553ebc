"""Between files and examples nothing is lost in silence: every row is used, or counted with its targets, or refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import build_tokenizer, colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.batch import Example, Source
from tunesmith.data.clean import CUT, truncated
from tunesmith.data.mix import RowOrder, shares
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.rows import Row
from tunesmith.data.spec import DataSpec, SourceSpec
from tunesmith.data.split import hold_back, hold_back_test
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


def rendered(mask: list[int], prompt: int) -> Rendered:
    ids = torch.arange(100, 100 + len(mask))
    example = Example(ids, {"target_weights": torch.tensor(mask, dtype=torch.float32)}, {"target_weights": "token"})
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    return Rendered(Row(Source("a", 1), messages, references=("b",)), example, tuple(ids[:prompt].tolist()))


@pytest.mark.parametrize(
    ("mask", "prompt", "limit", "kept"),
    [
        ([0, 0, 0, 1, 1, 1, 1, 0], 3, 7, 7),  # only what follows the end-of-turn is cut
        ([0, 0, 0, 1, 1, 1, 1, 0], 3, 6, None),  # the answer would fit, its end-of-turn would not
        ([0, 0, 0, 1, 1, 1, 1, 0], 3, 5, 5),
        ([0, 0, 0, 1, 1, 1, 1, 0], 3, 3, None),
        ([0, 0, 1, 1, 0, 0, 0, 1, 1], 7, 8, 4),  # back to the end of the first answer
        ([0, 0, 1, 1, 0, 0, 0, 1, 1], 7, 6, 4),  # a question is never cut
        ([0, 1, 1, 1, 1, 1, 1, 1], 5, 4, None),  # everything is trained on: the question is not cut there either
        ([0, 1, 1, 1, 1, 1, 1, 1], 3, 5, 5),
    ],
)
def test_where_a_row_is_cut(mask: list[int], prompt: int, limit: int, kept: int | None) -> None:
    shorter = truncated(rendered(mask, prompt), limit)
    assert (len(shorter.example) if shorter else None) == kept
    if shorter:
        assert shorter.cut_targets == sum(mask[kept:])
        assert len(shorter.cut_ids) == len(mask) - len(shorter.example)


@given(
    answers=st.lists(st.tuples(st.integers(1, 5), st.integers(2, 6)), min_size=1, max_size=4),
    after=st.integers(0, 2),
    data=st.data(),
)
def test_a_cut_row_keeps_whole_questions_and_no_target_outside_an_answer(
    answers: list[tuple[int, int]], after: int, data: st.DataObject
) -> None:
    mask, prompt = [], 0
    for question, answer in answers:
        mask += [0] * question
        prompt = len(mask)
        mask += [1] * answer + [0] * after
    item = rendered(mask, prompt)
    limit = data.draw(st.integers(1, len(mask)))
    shorter = truncated(item, limit)
    if shorter is None:
        first = mask.index(1)
        ends = first + answers[0][1]
        assert limit <= first or limit == ends - 1
        return
    weights = shorter.example.tensors["target_weights"].tolist()
    assert len(weights) <= limit and weights == mask[: len(weights)]
    assert weights[-1] == 1, "what follows the last kept answer is of no use"
    assert [*shorter.example.token_ids.tolist(), *shorter.cut_ids] == item.example.token_ids.tolist()
    assert shorter.cut_targets + shorter.example.targets == sum(mask)


# --- held-out rows ---


def rows_of(prompts: list[str]) -> list[Row]:
    return [
        Row(
            Source("a", line),
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": f"answer {line}"}),
            references=("x",),
        )
        for line, prompt in enumerate(prompts, start=1)
    ]


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (3, 1), (5, 1), (6, 2), (30, 10), (60, 20), (200, 20), (400, 40), (3000, 200)]
)
def test_sizes_of_the_default_test(count: int, held: int) -> None:
    kept, test = hold_back_test(rows_of([f"prompt {at}" for at in range(count)]), seed=0)
    assert (len(kept), len(test)) == (count - held, held)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda given: len(set(given)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_row_is_lost_and_no_prompt_stands_on_both_sides(numbers: list[int], share: float, seed: int) -> None:
    rows = rows_of([f"Prompt {number}" for number in numbers])
    kept, held = hold_back(rows, share, seed=seed, key="data.test")
    assert kept and held
    assert sorted(row.source.line for row in [*kept, *held]) == list(range(1, len(rows) + 1))
    assert not {row.prompt_key for row in kept} & {row.prompt_key for row in held}
    most = max(Counter(numbers).values())
    assert len(held) <= max(round(share * len(rows)), min(Counter(numbers).values()), 1)
    assert len(held) > round(share * len(rows)) - most or len({row.prompt_key for row in kept}) == 1
    shuffled = random.Random(seed).sample(rows, len(rows))
    _, again = hold_back(shuffled, share, seed=seed, key="data.test")
    assert {row.source.line for row in again} == {row.source.line for row in held}


def test_a_split_depends_on_seed_and_purpose_but_not_on_folding() -> None:
    rows = rows_of([f"Prompt {at}" for at in range(200)])

    def held(rows: list[Row], seed: int, key: str) -> set[int]:
        return {row.source.line for row in hold_back(rows, 0.2, seed=seed, key=key)[1]}

    first = held(rows, 0, "data.test")
    assert len(first) == 40
    assert held(rows_of([f"  PROMPT  {at}" for at in range(200)]), 0, "data.test") == first
    assert held(rows, 1, "data.test") != first
    assert held(rows, 0, "data.validation") != first


def test_one_large_group_is_not_held_back_where_a_small_one_will_do() -> None:
    rows = rows_of(["Write a poem"] * 90 + [f"Prompt {at}" for at in range(10)])
    for seed in range(20):
        kept, held = hold_back(rows, 0.1, seed=seed, key="data.test")
        assert len(held) <= 10 and len(kept) >= 90


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


def test_every_row_once_an_epoch_in_another_order() -> None:
    order = RowOrder([0] * 37, [], seed=5)
    epochs = [order.rows(37 * epoch, 37 * (epoch + 1)) for epoch in range(3)]
    assert all(sorted(rows) == list(range(37)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert RowOrder([0] * 37, [], seed=6).rows(0, 37) != epochs[0]
    assert RowOrder([0] * 37, [], seed=5).rows(30, 80) == [*epochs[0], *epochs[1], *epochs[2]][30:80]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_weights_are_exact_and_no_row_comes_again_too_early(
    sizes: list[int], weights: list[float], seed: int, data: st.DataObject
) -> None:
    origins = [source for source, size in enumerate(sizes) for _ in range(size)]
    weights = weights[: len(sizes)]
    order = RowOrder(origins, weights, seed)
    total = len(origins)
    expected = shares(weights, total)
    assert sum(expected) == total
    assert all(abs(count - weight / sum(weights) * total) < 1 for count, weight in zip(expected, weights, strict=True))
    stream = order.rows(0, 4 * total)
    used: Counter[int] = Counter()
    for epoch in range(4):
        drawn = Counter(origins[row] for row in stream[epoch * total : (epoch + 1) * total])
        assert [drawn[source] for source in range(len(sizes))] == expected
    for row in stream:
        used[row] += 1
        same = [used[other] for other, origin in enumerate(origins) if origin == origins[row]]
        assert max(same) - min(same) <= 1, "a row came again before all of its source were used"
    start = data.draw(st.integers(0, 4 * total))
    stop = data.draw(st.integers(start, 4 * total))
    assert RowOrder(origins, weights, seed).rows(start, stop) == stream[start:stop]


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
