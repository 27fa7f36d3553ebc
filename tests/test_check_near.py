"""Near duplicates and near leakage: what a person would call a copy, and nothing else."""

from __future__ import annotations

import errno
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checking import checked, exchange, exchanges, found, one, text_row
from tunesmith.base import InputError
from tunesmith.data.check import Checks
from tunesmith.data.check.near import jaccard
from tunesmith.data.check.words import WordHashes, grams, words_of

LONG = (
    "The council maintains a specification and a conformance test suite for the type system, answers questions that "
    "come up between the checkers, and decides which proposals move forward. Its members serve for as long as they "
    "wish, and new ones are chosen by those who already sit on it, so that knowledge is handed on from one to the next."
)
ANSWER = "It keeps the specification and the tests, settles disputes and chooses its own members."


def random_texts(count: int, words: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(4000)]
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def test_a_long_row_with_one_word_changed_is_found_and_the_first_is_kept():
    rows = exchanges([(LONG, ANSWER), ("What is a type?", "A set of values."), (LONG.replace("wish", "like"), ANSWER)])
    checks = checked(rows)
    finding = one(checks, "near-duplicates")
    assert (finding.level, finding.rows, finding.of) == ("warning", 1, 3)
    assert finding.title == (
        "1 training row repeats an earlier one almost word for word (1 group, similarity 0.8 or more)"
    )
    assert finding.instances[0].source == "rows.jsonl:3"
    assert finding.instances[0].other == "rows.jsonl:1"
    assert finding.instances[0].what.endswith('…"; here "like", there "wish"')
    assert checks.flagged() == {"near-duplicates": [2]}


def test_rows_that_differ_in_case_and_space_only_are_the_same_and_not_reported_here():
    checks = checked(exchanges([(LONG, ANSWER), (LONG.upper(), ANSWER), (LONG.replace(" ", "  "), f" {ANSWER}")]))
    assert not found(checks, "near-duplicates")
    assert checks.flagged() == {}


def test_twins_of_a_dropped_row_go_with_it_but_are_counted_once():
    copy = LONG.replace("wish", "like")
    checks = checked(exchanges([(LONG, ANSWER), (copy, ANSWER), (copy.upper(), ANSWER)]))
    assert one(checks, "near-duplicates").rows == 1
    assert checks.flagged() == {"near-duplicates": [1, 2]}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Why hasn't my top up gone through?", "pending"), ("Why hasn't my top-up gone through?", "pending")),
        (
            ("Can you tell me why I haven't received my new card?", "card_arrival"),
            ("Can you tell me why I haven't received my new card yet?", "card_arrival"),
        ),
        (
            ("这种方法可以用来训练语言模型，并且速度非常快，效果也很好", "是的"),
            ("这种方法可以用来训练语言模型，并且速度非常快，效果也好", "是的"),
        ),
    ],
)
def test_short_copies_are_found(first: tuple[str, str], second: tuple[str, str]):
    assert one(checked(exchanges([first, second])), "near-duplicates").rows == 1


TABLE = (
    "table: 1-1000181-1\ncolumns: State/territory, Text/background colour, Format, Current slogan, Series, Notes\nQ: "
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Can I use my card in Germany?", "country_support"), ("Can I use my card in France?", "country_support")),
        (("How do I change my PIN?", "change_pin"), ("How do I change my address?", "edit_details")),
        (("Convert 45 kilometers to meters.", "45000 meters"), ("Convert 46 kilometers to meters.", "46000 meters")),
        (
            (f"{TABLE}What is the format for South Australia?", "SELECT Format FROM t WHERE State = 'South Australia'"),
            (f"{TABLE}What is the format for Victoria?", "SELECT Format FROM t WHERE State = 'Victoria'"),
        ),
        (("How do I learn C++ at home?", "Read."), ("How do I learn C at home?", "Read.")),
        ((LONG, "yes"), (LONG.replace("wish", "like"), "no")),
        ((LONG, LONG), (LONG.replace("wish", "like"), " ".join(reversed(LONG.split())))),
    ],
)
def test_rows_that_only_look_alike_are_left_alone(first: tuple[str, str], second: tuple[str, str]):
    checks = checked(exchanges([first, second]))
    assert not found(checks, "near-duplicates"), checks.findings()


def test_rows_of_one_template_are_not_copies_of_each_other():
    template = "Below is an instruction. Write a response that completes it, and take care to be right.\n\nTranslate: "
    words = random_texts(300, 1)
    rows = exchanges((template + word, "a word") for word in words)
    assert not found(checked(rows), "near-duplicates")
    system = "You are a careful assistant that translates words and never makes anything up, whatever is asked."
    rows = [exchange(word, "a word", i, system=system) for i, word in enumerate(words)]
    assert not found(checked(rows), "near-duplicates")


def test_copies_within_a_template_are_found():
    template = "Below is an instruction. Write a response that completes it, and take care to be right.\n\nSummarise: "
    texts = random_texts(120, 40)
    copies = [text.replace(text.split()[20], "changed", 1) for text in texts[:30]]
    rows = exchanges((template + text, "short") for text in [*texts, *copies])
    assert one(checked(rows), "near-duplicates").rows == 30


def test_near_leakage_names_the_training_row_and_its_held_out_twin():
    train = exchanges([("What is a type?", "A set of values."), (LONG.replace("wish", "like"), ANSWER)])
    checks = checked(train, [exchange(LONG, ANSWER, 9)])
    finding = one(checks, "near-leakage")
    assert (finding.level, finding.rows, finding.of) == ("problem", 1, 2)
    assert (finding.instances[0].source, finding.instances[0].other) == ("rows.jsonl:2", "rows.jsonl:9")
    assert checks.findings()[0].kind == "near-leakage"
    assert checks.flagged() == {"near-leakage": [1]}


def test_the_same_prompt_in_the_held_out_rows_is_overlap_and_not_reported_here():
    checks = checked([exchange(LONG, ANSWER)], [exchange(LONG.upper(), ANSWER.replace("tests", "trials"))])
    assert not found(checks, "near-leakage")


def test_held_out_rows_that_are_near_each_other_are_not_reported():
    checks = checked([exchange("Hello?", "Hi.")], exchanges([(LONG, ANSWER), (LONG.replace("wish", "like"), ANSWER)]))
    assert not checks.findings()


def test_raw_texts_are_compared_whole():
    checks = checked([text_row(LONG), text_row(LONG.replace("wish", "like")), text_row("Something else entirely.")])
    assert checks.flagged() == {"near-duplicates": [1]}


def test_the_threshold_counts():
    rows = exchanges(
        [(LONG, ANSWER), (LONG.replace("wish", "like").replace("tests", "x").replace("chosen", "y"), ANSWER)]
    )
    assert not found(checked(rows, near_threshold=0.95), "near-duplicates")
    assert found(checked(rows, near_threshold=0.6), "near-duplicates")


def test_the_callers_numbers_are_returned():
    checks = Checks()
    for number, text in ((7, LONG), (3, LONG.replace("wish", "like")), (11, "Nothing like it at all.")):
        checks.add(text_row(text, number), "train.jsonl", number)
    assert checks.flagged() == {"near-duplicates": [3]}


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_long_copies_with_one_word_changed_are_found_in_any_order(data: st.DataObject):
    texts = random_texts(25, 70, seed=data.draw(st.integers(0, 1000)))
    chosen = data.draw(st.lists(st.integers(0, 24), unique=True, min_size=1, max_size=8))
    at = data.draw(st.integers(0, 69))
    copies = [" ".join(w if i != at else "changed" for i, w in enumerate(texts[c].split())) for c in chosen]
    rows = [text_row(text, line) for line, text in enumerate([*texts, *copies])]
    finding = one(checked(rows), "near-duplicates")
    assert finding.rows == len(chosen)
    shuffled = data.draw(st.permutations(rows))
    again = one(checked(shuffled), "near-duplicates")
    assert (again.rows, again.title) == (finding.rows, finding.title)


def test_the_same_rows_and_seed_give_the_same_findings():
    rows = [text_row(text, i) for i, text in enumerate(random_texts(200, 50) * 2)]
    rows += [text_row(f"{text} more", i) for i, text in enumerate(random_texts(50, 50))]
    assert checked(rows, seed=3).findings() == checked(rows, seed=3).findings()


def test_similarity_is_jaccard_of_runs_of_words():
    of = WordHashes().of
    assert jaccard(of(words_of(LONG)), of(words_of(LONG.upper()))) == 1.0
    assert jaccard(of(["a", "b", "c"]), of(["a", "b", "d"])) == pytest.approx(2 / 6)
    assert len(grams(of(["a", "b"]), 3)) == 0


def test_word_hashes_are_the_same_after_forgetting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tunesmith.data.check.words._CACHED", 10)
    words = [f"w{i}" for i in range(50)]
    few = WordHashes()
    assert np.array_equal(few.of(words), few.of(words))
    assert len(few) <= 10


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch):
    class Full:
        def seek(self, _: int) -> None: ...
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    checks = Checks()
    monkeypatch.setattr(checks._store, "_file", Full())
    with pytest.raises(InputError) as caught:
        checks.add(text_row("a"), "train", 0)
    assert "cannot be kept in a temporary file (No space left on device)" in str(caught.value)
    assert "TMPDIR" in str(caught.value)


def test_no_row_can_be_added_after_the_findings():
    checks = checked([text_row("a")])
    checks.findings()
    with pytest.raises(RuntimeError, match="after the findings"):
        checks.add(text_row("b"), "train", 1)


def test_no_rows_at_all_give_no_findings():
    assert Checks().findings() == []
    assert Checks().flagged() == {}
