"""Contradictory, degenerate and lopsided answers; preference pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from checking import checked, exchange, exchanges, found, one
from tunesmith.base import Source
from tunesmith.data.check.degenerate import repeats
from tunesmith.data.row import Row

NOUNS = "amber basalt cedar delta ember fjord grove harbour island juniper kelp lagoon meadow nectar orchard".split()


def plain(count: int) -> list[tuple[str, str]]:
    """Rows that have nothing wrong with them."""
    return [
        (
            f"Tell me something about {NOUNS[i % 15]} number {i}.",
            f"The {NOUNS[i % 15]} {i} grows near {NOUNS[(i * 7 + i // 15) % 15]}.",
        )
        for i in range(count)
    ]


def test_one_prompt_with_two_answers_is_shown_with_both():
    checks = checked(
        exchanges([("Is it open?", "Yes"), ("Who?", "Me."), ("is it  OPEN?", "No"), ("Is it open?", "yes.")])
    )
    finding = one(checks, "contradictory-answers")
    assert finding.title == "1 prompt has different answers in 3 rows"
    assert (finding.level, finding.rows, finding.of) == ("warning", 3, 4)
    shown = finding.instances[0]
    assert (shown.source, shown.other) == ("rows.jsonl:1", "rows.jsonl:3")
    assert shown.what == '"Is it open?" is answered "Yes" and "No"'


@pytest.mark.parametrize(
    "rows",
    [
        exchanges([("Is it open?", "Yes"), ("Is it open?", " yes. ")]),
        [exchange("Open?", "Yes", 1, system="Answer truly."), exchange("Open?", "No", 2, system="Always lie.")],
        [exchange("Open?", "Yes", 1, rejected="No"), exchange("Open?", "Sure", 2, rejected="No")],
        [replace(exchange("Open?", a, n), references=(a, "Maybe")) for n, a in enumerate(("Yes", "No"))],
    ],
    ids=["the same folded", "another system turn", "preference pairs", "several references"],
)
def test_no_contradiction(rows: list[Row]):
    assert not found(checked(rows), "contradictory-answers")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("...", "only punctuation"),
        ("—", "only punctuation"),
        ("-" * 80, "only punctuation"),
        ("N/A", "only a placeholder"),
        ("TODO", "only a placeholder"),
        ("null", "only a placeholder"),
        ("[Answer]", "only a placeholder"),
        ("Lorem ipsum", "only a placeholder"),
        ("very " * 40, "one thing over and over"),
        ("I think that this is the case. " * 12, "one thing over and over"),
        ("Sure, here it is: " + "the end of the day " * 15, "one thing over and over"),
        ("ha" * 40, "one thing over and over"),
        ("Translate the whole sentence please now", "the same as its prompt"),
    ],
)
def test_an_answer_that_says_nothing_is_flagged(answer: str, reason: str):
    checks = checked([*exchanges(plain(30)), exchange("Translate the whole  sentence please now", answer, 77)])
    finding = one(checks, "degenerate-answers")
    assert finding.level == "problem"
    assert finding.title == f"1 answer (3.2 %) says nothing: 1 {reason}"
    assert finding.instances[0].source == "rows.jsonl:77"
    assert finding.instances[0].what.startswith(f"{reason}: ")
    assert checks.flagged() == {"degenerate-answers": [30]}


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "none",
        "A",
        "😀",
        "<",
        "?!x",
        "x = 0; y = 0; z = 0; a = 0; b = 0; c = 0; d = 0",
        "0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0",
        "[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]",
        "| a | b |\n| --- | --- |\n| one | two |\n| three | four |\n| five | six |",
        "SELECT a, b, c FROM t WHERE a = 1 AND b = 2 AND c = 3 AND d = 4",
        "for i in range(10):\n    print(i)\nfor j in range(10):\n    print(j)",
        "This answer was cut off in the mid",
        "No, no, no, that is not what I meant by the word at all.",
        "The placeholder N/A means that there is no answer.",
    ],
)
def test_short_numbers_code_and_cut_answers_are_left_alone(answer: str):
    assert not found(checked([*exchanges(plain(30)), exchange("What?", answer, 77)]), "degenerate-answers")


def test_a_correction_that_changes_nothing_may_repeat_its_prompt():
    sentence = "He goes to the park every day."
    row = exchange(sentence, sentence, system="Correct the sentence.")
    assert not found(checked([row]), "degenerate-answers")


def test_what_looks_like_a_placeholder_may_be_a_label():
    labelled = [(f"{prompt} again", ("n/a", "?", "found")[i % 3]) for i, (prompt, _) in enumerate(plain(60))]
    checks = checked(exchanges(labelled))
    assert not found(checks, "degenerate-answers")
    assert "degenerate-answers" not in checks.flagged()


def test_held_out_rows_are_counted_and_not_dropped():
    checks = checked(exchanges(plain(3)), [exchange("Why?", "TODO")])
    assert one(checks, "degenerate-answers").rows == 1
    assert checks.flagged() == {}


def test_a_call_of_a_tool_is_no_empty_answer():
    call = {"role": "assistant", "content": "...", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    row = Row(source=Source("rows.jsonl", 1), messages=({"role": "user", "content": "When?"}, call))
    assert not checked([row]).findings()


@pytest.mark.parametrize(
    "text", ["ab " * 5, "la la land", "one two three four five six seven eight nine ten", "abcabc"]
)
def test_little_repetition_is_none(text: str):
    assert not repeats(text)


def test_refusals_are_a_note():
    rows = exchanges(
        [
            ("Who are you?", "As an AI language model, I cannot have a name."),
            ("Help me.", "I'm sorry, but I can't help with that."),
            ("What did he say?", "I am happy that he spoke as an artist."),
        ]
    )
    finding = one(checked(rows), "refusals")
    assert (finding.level, finding.rows) == ("note", 2)
    assert finding.title == "2 answers (67 %) refuse or speak as an AI model"


def test_one_long_answer_in_many_rows():
    answer = "Please contact our support team and have the number of your order at hand."
    checks = checked(exchanges([*plain(100), *((f"Question {n} about {NOUNS[n % 15]}?", answer) for n in range(25))]))
    finding = one(checks, "repeated-answer")
    assert finding.title == "1 long answer stands word for word in 25 rows (20 %)"
    assert finding.instances[0].what.startswith('25 times "Please contact')
    assert "repeated-answer" not in checks.flagged()


def labelled(**counts: int) -> list[Row]:
    prompts = iter(plain(1000))
    return exchanges((next(prompts)[0], label) for label, count in counts.items() for _ in range(count))


def test_balance_of_labels():
    finding = one(checked(labelled(positive=60, negative=30)), "label-balance")
    assert finding.level == "note"
    assert finding.title == (
        '2 classes: the largest is "positive" with 67 %, the smallest "negative" with 33 % (ratio 2.0)'
    )
    assert [i.what for i in finding.instances] == ['"positive": 60 rows (67 %)', '"negative": 30 rows (33 %)']


def test_rare_labels_are_a_warning():
    finding = one(checked(labelled(positive=60, negative=30, neutral=3)), "label-balance")
    assert (finding.level, finding.rows, finding.of) == ("warning", 3, 93)
    assert finding.title.endswith("(ratio 20.0); 1 has fewer than 5 rows")
    assert [i.what for i in finding.instances] == ['"neutral": 3 rows (3.2 %)']


def test_labels_that_training_never_sees_and_two_spellings():
    held = [exchange("And this one over there?", "mixed", 5)]
    titles = [f.title for f in found(checked(labelled(Good=20, good=10, bad=20), held), "label-balance")]
    assert "1 label of the held-out rows is never seen in training (1 row)" in titles
    assert "1 label is written in more than one way" in titles


def test_answers_in_prose_are_no_labels():
    assert not found(checked(exchanges(plain(60))), "label-balance")


def test_labels_of_words_are_counted_without_those_outside():
    row = Row(
        source=Source("rows.jsonl", 1),
        words=("Ada", "met", "Bob", "in", "Rome"),
        labels=("PER", "O", "PER", "O", "LOC"),
    )
    finding = one(checked([row] * 6), "label-balance")
    assert finding.title.startswith('2 labels: the largest is "per" with 67 %')


def test_preference_pairs():
    pairs = [
        exchange(p, a, n, rejected=a if n < 2 else f"{a} And so on, and so on.") for n, (p, a) in enumerate(plain(10))
    ]
    problem, note = found(checked(pairs), "preference")
    assert (problem.level, problem.rows) == ("problem", 2)
    assert problem.title == "2 pairs (20 %) have the same chosen and rejected answer"
    assert note.level == "note"
    assert "on average 0.50 times as long" in note.title
    assert note.title.endswith("the longer one is chosen in 0.0 %")
