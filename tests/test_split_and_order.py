"""Where a row is cut, which rows are held back, and in which order the others come: pure functions and their laws."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.base import InputError, Source
from tunesmith.batch import Example
from tunesmith.data.mix import RowOrder, places_in_an_epoch, shares
from tunesmith.data.render import Rendered
from tunesmith.data.rows import Row
from tunesmith.data.sources import source_specs
from tunesmith.data.spec import DataSpec, ReplaySpec, SourceSpec
from tunesmith.data.split import Belonging, hold_back, hold_back_test
from tunesmith.data.truncate import truncated

# --- where a row is cut ---


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


# --- rows that are held back ---


def rows_of(prompts: list[str]) -> list[Row]:
    return [
        Row(
            Source("a", line),
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": f"answer {line}"}),
            references=("x",),
        )
        for line, prompt in enumerate(prompts, start=1)
    ]


def keys(values: Iterable[object]) -> np.ndarray:
    return np.array([blake2b(str(value).encode(), digest_size=16).digest() for value in values], "S16")


def belonging(rows: list[Row]) -> Belonging:
    return Belonging(np.array([bytes.fromhex(row.prompt_key) for row in rows], "S16"))


def parted(rows: list[Row], share: float, *, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    held = hold_back(belonging(rows), share, seed=seed, key=key)
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (3, 1), (5, 1), (6, 2), (30, 10), (60, 20), (200, 20), (400, 40), (3000, 200)]
)
def test_sizes_of_the_default_test(count: int, held: int) -> None:
    test = hold_back_test(belonging(rows_of([f"prompt {at}" for at in range(count)])), seed=0)
    assert (len(test), test.sum()) == (count, held)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda given: len(set(given)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_row_is_lost_and_no_prompt_stands_on_both_sides(numbers: list[int], share: float, seed: int) -> None:
    rows = rows_of([f"Prompt {number}" for number in numbers])
    kept, held = parted(rows, share, seed=seed, key="data.test")
    assert kept and held
    assert sorted(row.source.line for row in [*kept, *held]) == list(range(1, len(rows) + 1))
    assert not {row.prompt_key for row in kept} & {row.prompt_key for row in held}
    most = max(Counter(numbers).values())
    assert len(held) <= max(round(share * len(rows)), min(Counter(numbers).values()), 1)
    assert len(held) > round(share * len(rows)) - most or len({row.prompt_key for row in kept}) == 1
    shuffled = random.Random(seed).sample(rows, len(rows))
    _, again = parted(shuffled, share, seed=seed, key="data.test")
    assert {row.source.line for row in again} == {row.source.line for row in held}


def test_a_split_depends_on_seed_and_purpose_but_not_on_folding() -> None:
    rows = rows_of([f"Prompt {at}" for at in range(200)])

    def held(rows: list[Row], seed: int, key: str) -> set[int]:
        return {row.source.line for row in parted(rows, 0.2, seed=seed, key=key)[1]}

    first = held(rows, 0, "data.test")
    assert len(first) == 40
    assert held(rows_of([f"  PROMPT  {at}" for at in range(200)]), 0, "data.test") == first
    assert held(rows, 1, "data.test") != first
    assert held(rows, 0, "data.validation") != first


def test_one_large_group_is_not_held_back_where_a_small_one_will_do() -> None:
    rows = rows_of(["Write a poem"] * 90 + [f"Prompt {at}" for at in range(10)])
    for seed in range(20):
        kept, held = parted(rows, 0.1, seed=seed, key="data.test")
        assert len(held) <= 10 and len(kept) >= 90


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 12)), min_size=4, max_size=60),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 3),
)
def test_no_group_and_no_prompt_stands_on_both_sides(rows: list[tuple[int, int]], share: float, seed: int) -> None:
    prompts, groups = zip(*rows, strict=True)
    by = Belonging(keys(prompts), keys(f"group {group}" for group in groups))
    try:
        held = hold_back(by, share, seed=seed, key="data.test")
    except InputError as refused:
        assert "too few to hold any back" in str(refused), "everything hangs together"
        return
    for values in (prompts, groups):
        out = {value for value, is_held in zip(values, held, strict=True) if is_held}
        assert out.isdisjoint(value for value, is_held in zip(values, held, strict=True) if not is_held)
    order = np.random.default_rng(seed).permutation(len(rows))
    again = hold_back(Belonging(by.prompts[order], by.groups[order]), share, seed=seed, key="data.test")  # type: ignore[index]
    assert (again == held[order]).all(), "the order of the rows plays no part"


def test_strata_keep_their_shares() -> None:
    labels = ["common"] * 160 + ["rare"] * 30 + ["single"] * 10
    by = Belonging(keys(range(200)), strata=keys(labels))
    for seed in range(5):
        held = hold_back(by, 0.2, seed=seed, key="data.test")
        assert Counter(label for label, out in zip(labels, held, strict=True) if out) == {
            "common": 32,
            "rare": 6,
            "single": 2,
        }


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
def test_shares_are_exact_and_no_row_comes_again_too_early(
    sizes: list[int], weights: list[float], seed: int, data: st.DataObject
) -> None:
    origins = [source for source, size in enumerate(sizes) for _ in range(size)]
    weights = weights[: len(sizes)]
    expected = shares(weights, data.draw(st.integers(1, 2 * len(origins))))
    total = sum(expected)
    order = RowOrder(origins, expected, seed)
    assert order.epoch_rows == total
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
    assert RowOrder(origins, expected, seed).rows(start, stop) == stream[start:stop]


def places(sources: list[SourceSpec], rows: list[int], **section: object) -> list[int]:
    spec = DataSpec.model_validate({"train": sources, **section})
    return places_in_an_epoch(spec, source_specs(spec), rows)


def of(**settings: object) -> SourceSpec:
    return SourceSpec.model_validate({"path": "rows.jsonl", **settings})


def test_what_an_epoch_holds() -> None:
    assert places([of(), of()], [30, 70]) == [], "every row once"
    assert places([of(weight=80), of(weight=20)], [500, 500]) == [800, 200]
    assert places([of(epochs=2), of(), of(epochs=0.5)], [30, 70, 41]) == [60, 70, 20]
    assert places([of(), of()], [100, 900], temperature=1) == [100, 900]
    assert places([of(), of()], [100, 900], temperature=2) == [250, 750]
    replay = ReplaySpec(path="general.jsonl", share=0.1)
    assert places([of()], [900, 5000], replay=replay) == [900, 100]
    assert places([of(weight=1), of(weight=1)], [600, 300, 5000], replay=replay) == [450, 450, 100]


@pytest.mark.parametrize(
    ("sources", "rows", "section", "said"),
    [
        ([of(weight=1), of()], [5, 5], {}, "some sources have a weight and some have none"),
        ([of(weight=1), of(weight=1, epochs=2)], [5, 5], {}, "weight and epochs both say how much"),
        ([of(epochs=2), of()], [5, 5], {"temperature": 2}, "epochs and temperature both say how much"),
        ([of(weight=1), of(weight=1000)], [5, 5], {}, "none of an epoch's 10 rows comes from"),
        ([of(weight=1), of(weight=1)], [5, 0], {}, "no row of rows.jsonl is left"),
        ([of()], [5, 0], {"replay": ReplaySpec(path="general.jsonl")}, "no row of general.jsonl is left"),
        ([of()], [2, 9], {"replay": ReplaySpec(path="general.jsonl", share=0.01)}, "comes from general.jsonl"),
    ],
)
def test_mixtures_that_cannot_be(sources: list[SourceSpec], rows: list[int], section: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        places(sources, rows, **section)
    assert caught.value.fix
