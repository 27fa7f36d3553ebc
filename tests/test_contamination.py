"""Items that stand in the training data are found; wording that many share is not."""

from __future__ import annotations

import random

from tunesmith.data.contamination import COMMON, Contamination, told

RNG = random.Random(0)
WORDS = [f"word{at}" for at in range(5000)]


def text(count: int) -> str:
    return " ".join(RNG.sample(WORDS, count))


def found(items: list[str], training: list[str], share: float = 0.0) -> dict:
    looking = Contamination({"hellaswag": items}, {"hellaswag": share})
    looking.look((f"train.jsonl:{line}", each) for line, each in enumerate(training, 1))
    return looking.found()[0]


def test_thirteen_words_in_a_row_are_found_whatever_their_case_and_punctuation() -> None:
    item = text(30)
    inside = ", ".join(item.upper().split()[5:18])
    result = found([text(30), item], [text(50), f"{text(5)} {inside} {text(9)}"])
    assert (result["found"], result["of"]) == (1, 2)
    assert result["examples"][0]["item"] == 2 and result["examples"][0]["source"] == "train.jsonl:2"
    assert told([result]) == ["1 of 2 hellaswag stand in the training data"]


def test_twelve_words_of_a_long_item_are_not_enough_and_eight_of_a_short_one_are() -> None:
    long, short = text(30), text(9)
    training = [f"{text(4)} {' '.join(long.split()[:12])} {text(4)}", f"{text(3)} {' '.join(short.split()[:8])} x"]
    assert found([long], training)["found"] == 0
    assert found([short], training)["found"] == 1


def test_items_that_are_too_short_are_counted_and_not_looked_for() -> None:
    result = found(["one two three"], ["one two three " * 9])
    assert (result["found"], result["too_short"]) == (0, 1)


def test_wording_of_many_items_or_many_rows_counts_for_nothing() -> None:
    shared = text(14)
    items = [f"{shared} {text(10)}" for _ in range(COMMON + 1)]
    assert found(items, [shared])["found"] == 0
    assert found(items[:2], [f"{shared} {text(5)}" for _ in range(COMMON + 1)])["found"] == 0
    assert found(items[:2], [f"{shared} {text(5)}"])["found"] == 2


def test_a_share_of_the_runs_may_be_asked_for() -> None:
    item = text(60)
    half, most = " ".join(item.split()[:30]), " ".join(item.split()[:55])
    assert found([item], [half], share=0.7)["found"] == 0
    assert found([item], [most], share=0.7)["found"] == 1
