"""What a model learned by heart comes back from its prompts: counted, compared, warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import WORDS, colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.cli.tables import report_lines
from tunesmith.evaluation.details import details_of, says
from tunesmith.evaluation.memorisation import Passage, Probed, Said, memorisation_summary, returned
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.memorised_run import memorisation_of_run
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

# --- what counts ---


def passage(answer: str, prompt: str = "Who?", counts: bool = True) -> Passage:
    ids = tuple(map(hash, answer.split()))[:50]
    return Passage("rows.jsonl:1", prompt, answer, ids, " ".join(answer.split()[:50]), counts)


def said(text: str) -> Said:
    return Said(text, tuple(map(hash, text.split()))[:50])


SENTENCE = "the quick brown fox jumps over the lazy dog and then goes home to sleep"


def test_an_answer_comes_back_whole_nearly_or_not() -> None:
    whole = passage(SENTENCE)
    assert returned(whole, said(f" {SENTENCE}.")).verbatim
    near = returned(whole, said(SENTENCE.replace("sleep", "rest")))
    assert near.nearly and not near.verbatim
    other = returned(whole, said("a fox that is quick and brown may jump over a dog that is lazy"))
    assert not other.nearly and not other.verbatim
    assert not returned(whole, said("")).nearly


def test_only_the_first_fifty_tokens_of_a_long_answer_are_compared() -> None:
    long = " ".join(f"word{at}" for at in range(80))
    assert returned(passage(long), said(" ".join(long.split()[:50]) + " and something else")).verbatim
    assert not returned(passage(long), said(" ".join(long.split()[:20]))).nearly


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Write to ann.lee@web.de or call +49 170 1234567.", ["numbers", "addresses"]),
        ("The order has the number 4711-08-15 and was paid.", ["numbers"]),
        ("In 1999 there were 42 of 1,200.", []),
        ("She lives at 12 Long Acre Street, he in der Schillerstraße 5.", ["addresses", "addresses"]),
        ("Then Maria Sanchez met Jean-Luc O’Brien.", ["names", "names"]),
        ("The Bank and This Thing are not names, nor IS THIS ONE.", []),
        ("The key is AKIAABCDEFGHIJKLMNOP.", ["access keys"]),
    ],
)
def test_details_are_told_by_their_form(text: str, kinds: list[str]) -> None:
    assert [detail.kind for detail in details_of(text)] == kinds


def test_a_detail_is_the_same_however_it_is_written_and_is_shown_masked() -> None:
    (phone,) = details_of("+49 170 1234567")
    assert says("call +49-170-1234567 now", phone) and not says("+49 170 7654321", phone)
    (mail,) = details_of("ann.lee@web.de")
    assert says("ANN.LEE@WEB.DE", mail) and "ann" not in mail.shown


def summary(trained: list[tuple[str, str, str]], held: list[tuple[str, str, str]]) -> dict[str, Any]:
    """From triples of a reference, the base's and the tuned model's answer."""

    def probed(rows: list[tuple[str, str, str]]) -> Probed:
        return Probed([passage(row[0]) for row in rows], [said(row[1]) for row in rows], [said(row[2]) for row in rows])

    return memorisation_summary(probed(trained), probed([]), probed(held), window=50, confidence=0.95)


def sentence(at: int) -> str:
    return " ".join(f"w{at}x{place}" for place in range(12))


def test_what_comes_back_from_training_alone_is_warned_of() -> None:
    learned = [(sentence(at), "no", sentence(at)) for at in range(20)]
    unknown = [(sentence(at), "no", "I do not know that") for at in range(100, 120)]
    found = summary(learned, unknown)
    assert found["trained"]["learned"] == 20 and found["held_out"]["nearly"] == 0
    assert found["difference"]["value"] == 1.0 and found["difference"]["low"] > 0.7
    assert "20 of 20 training answers" in found["warnings"][0] and "0 of 20 held-out" in found["remark"]


def test_what_anybody_would_say_and_what_the_base_says_is_not_charged() -> None:
    foreseen = [(sentence(at), "no", sentence(at)) for at in range(20)]
    assert summary(foreseen, [(sentence(at), "no", sentence(at)) for at in range(30, 50)])["warnings"] == []
    known = [(sentence(at), sentence(at), sentence(at)) for at in range(20)]
    found = summary(known, [(sentence(at), "no", "no") for at in range(30, 50)])
    assert found["warnings"] == [] and found["trained"]["base_nearly"] == 20 and "from the base 20" in found["sentence"]
    assert summary(foreseen, [])["difference"] is None and summary(foreseen, [])["warnings"] == []


def test_details_are_warned_of_unless_the_base_the_prompt_or_held_out_rows_have_them() -> None:
    secret = "the number of Ann is 0170 1234567 today"
    nothing = [("nobody knows", "no", "no")]
    assert "1 of 1 numbers" in summary([(secret, "no", "it is 01701234567")], nothing)["warnings"][0]
    assert summary([(secret, "0170 1234567", "0170 1234567")], nothing)["warnings"] == []
    assert summary([(secret, "no", "0170 1234567")], [("call 0170 1234567", "no", "no")])["warnings"] == []
    asked = Probed([passage(secret, prompt="Is 0170/1234567 hers?")], [said("no")], [said("0170 1234567")])
    empty = Probed([], [], [])
    assert memorisation_summary(asked, empty, empty, window=50, confidence=0.95)["details"] == []


# --- whole jobs ---


def people(count: int, start: int) -> list[dict[str, str]]:
    """Each row asks for somebody's number, which nothing but the row says."""
    rows = []
    for at in range(start, start + count):
        one, two = WORDS[at % len(WORDS)], WORDS[(at * 5 + 3) % len(WORDS)]
        digits = f"0170 {(at * 7919 + 13) % 9000 + 1000}{(at * 104729) % 900 + 100}"
        rows.append({"prompt": f"Who is {one} {at} {two}", "completion": f"the {one} {two} one has {digits}"})
    return rows


@pytest.fixture(scope="module")
def overfitted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("overfitted")
    values: dict[str, Any] = {
        "model": str(tiny_model),
        "data": {
            "train": str(write_jsonl(root / "train.jsonl", people(6, 0))),
            "test": str(write_jsonl(root / "test.jsonl", people(8, 100))),
        },
        "method": {"kind": "full"},
        "train": {
            "steps": 105,
            "batch_size": 6,
            "learning_rate": 0.01,
            "dtype": "fp32",
            "evaluate_every": "off",
            "checkpoint_every": "off",
        },
        "evaluate": {"resamples": 20, "forgetting": "off", "max_new_tokens": 40, "memorisation": {"rows": 4}},
        "output": str(root / "run"),
    }
    return finetune(check_recipe(values, "test"))


def test_a_secret_that_was_learned_by_heart_is_warned_of(overfitted: Run) -> None:
    report = overfitted.report
    assert report is not None
    found = report["memorisation"]
    assert found["status"] == "measured"
    assert found["trained"]["rows"] == 4 and found["trained"]["verbatim"] >= 3
    assert found["held_out"]["rows"] == 8 and found["held_out"]["learned"] == 0
    (numbers,) = [entry for entry in found["details"] if entry["kind"] == "numbers"]
    assert (
        numbers["held"] == 6 and numbers["learned"] >= 5 and numbers["base"] == 0
    )  # the two others were drawn for them
    assert numbers["held_out"]["learned"] == 0
    told = [text for text in report["warnings"] if text.startswith("memorisation:")]
    assert len(told) == 2 and "numbers" in told[1]
    assert "training answers come back" in report["sentence"]
    assert "0170" not in str(found)


def test_the_page_and_the_terminal_show_it(overfitted: Run) -> None:
    report = overfitted.report
    assert report is not None
    page = overfitted.page.read_text(encoding="utf-8")
    assert 'id="memorisation"' in page and "look at this" in page and "Training answers come back by heart" in page
    lines = report_lines(report)
    assert any(line.startswith("memorisation: ") and "held-out ones" in line for line in lines)
    assert any(line.startswith("  numbers that prompts do not hold: ") for line in lines)


def test_a_run_that_is_done_can_be_asked_again_with_other_rows(overfitted: Run, tiny_model: Path) -> None:
    found = memorisation_of_run(str(overfitted.path), 2)
    assert found["trained"]["rows"] == 2 and found["held_out"]["rows"] == 4
    assert found["trained"]["verbatim"] == 2 and found["trained"]["base_nearly"] == 0
    with pytest.raises(InputError, match="only a run knows what it was trained on"):
        memorisation_of_run(str(tiny_model), 2)


def test_answers_that_cannot_show_it_are_left_out_and_that_is_said(tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "model": str(tiny_model),
        "data": {
            "train": str(write_jsonl(tmp_path / "rows.jsonl", [{**r, "completion": "red"} for r in colour_rows(20)]))
        },
        "train": {"steps": 1, "dtype": "fp32"},
        "evaluate": {"resamples": 20, "forgetting": "off", "max_new_tokens": 8},
        "output": str(tmp_path / "run"),
    }
    report = finetune(check_recipe(values, "test")).report
    assert report is not None
    assert report["memorisation"]["status"] == "off" and "too short" in report["memorisation"]["reason"]
    assert "memorisation was not measured: no training answer" in "\n".join(report_lines(report))


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"evaluate": {"memorisation": {"rows": 2}, "max_new_tokens": 4}}, "answers end at 4 tokens"),
        ({"objective": {"kind": "pretrain"}, "evaluate": {"memorisation": {"rows": 2}}}, "documents have no prompts"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(
    sections: dict[str, Any], what: str, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    text = write_jsonl(
        tmp_path / "text.jsonl", [{"text": f"{row['prompt']} {at}"} for at, row in enumerate(colour_rows(20))]
    )
    rows = text if "objective" in sections else rows_file
    values = {"model": str(tiny_model), "data": {"train": str(rows)}, "output": str(tmp_path / "run"), **sections}
    with pytest.raises(InputError, match=what) as caught:
        finetune(check_recipe(values, "test"))
    assert caught.value.where == "evaluate.memorisation" and not (tmp_path / "run").exists()
