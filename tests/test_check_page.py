"""The page of `data check` says first whether training takes the rows, and shows what is wrong without colour too."""

from __future__ import annotations

import re
from typing import Any

import pytest

from test_pages import HOSTILE, Page, hostile, words
from tunesmith.pages.check import check_page
from tunesmith.pages.histogram import histogram_chart


def finding(level: str, title: str, rows: int = 2, instances: int | None = None, **more: Any) -> dict[str, Any]:
    shown = rows if instances is None else instances
    return {
        "kind": "duplicates",
        "level": level,
        "title": title,
        "rows": rows,
        "of": 1204,
        "instances": [
            {"source": f"train.jsonl:{at + 7}", "what": "the same row", "other": "train.jsonl:1" if at % 2 else ""}
            for at in range(shown)
        ],
        "fix": "data.duplicates: drop leaves out all but the first",
        **more,
    }


def bins(*rows: int, start: int = 5, step: int = 50) -> list[dict[str, int]]:
    return [{"from": start + step * at, "to": start + step * (at + 1), "rows": count} for at, count in enumerate(rows)]


def found(*findings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "ok": not any(item["level"] == "problem" for item in findings),
        "sources": [
            {"path": "data/train.jsonl", "role": "train", "format": "messages", "rows": 1204, "sha256": "ab" * 32},
            {"path": "data/test.jsonl", "role": "test", "format": "messages", "rows": 200, "sha256": "cd" * 32},
        ],
        "notes": ["data/train.jsonl: starts with a byte-order mark, which is skipped"],
        "rows": {"train": 1204, "held_out": {"data/test.jsonl": 200}, "wrong": 3},
        "lengths": {
            "unit": "tokens",
            "counted_by": "SmolLM2-135M-Instruct",
            "limit": 512,
            "total": 214_908,
            "least": 5,
            "most": 604,
            "p50": 120,
            "p90": 301,
            "p99": 560,
            "histogram": bins(120, 340, 301, 190, 122, 60, 31, 20, 9, 6, 3, 2),
        },
        "findings": list(findings),
        **more,
    }


def full() -> dict[str, Any]:
    return found(
        finding("problem", "3 rows cannot be read", 3, kind="wrong-rows"),
        finding("problem", "12 rows longer than 512 tokens (3,120 tokens to train on)", 12, kind="overlong"),
        finding("warning", "412 rows stand in the training data a second time", 412, 20),
        finding("note", "benchmarks were not looked at", 0, 0, kind="benchmark-overlap"),
    )


def test_the_page_is_well_formed_and_self_contained() -> None:
    source = check_page(full())
    page = Page(source)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("main") == tags.count("h1") == tags.count("header") == 1
    assert not set(tags) & {"script", "link", "img", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "src"
            assert not re.search(r"https?:|javascript:|//", value or "")
        assert tag != "th" or attributes.get("scope") in {"row", "col"}
        assert tag != "a" or str(attributes["href"])[1:] in page.ids
        for name in str(attributes.get("aria-labelledby") or "").split():
            assert name in page.ids


def test_everything_is_said() -> None:
    text = words(check_page(full()))
    said = """Verdict: Refused|Training would refuse these rows: 2 problems, 1 warning and 1 note.|Training rows1,204
        Held-out rows200|Rows that cannot be read3|Tokens in all214,908|Problems (2)|Warnings (1)|Notes (1)
        warning 412 rows stand in the training data a second time|412 rows of 1,204 (34 %)|15 more|What to do: data.dupl
        The first 20 are shown, of 412.|train.jsonl:8 the same row as train.jsonl:1|note Benchmarks were not looked at
        Training rows have from 5 to 604 tokens: half of them up to 120, 90 % up to 301, 99 % up to 560.
        Counted as SmolLM2-135M-Instruct reads them|data/train.jsonlsha256 abab|messages1,204|byte-order mark
        longer than the limit|limit: 512|55 to 104340"""
    missing = [part for line in said.splitlines() for part in line.strip().split("|") if part not in text]
    assert not missing
    assert "None" not in text and "cleaned file" not in text and "not recorded" not in text


def test_rows_that_would_be_taken() -> None:
    source = check_page(found())
    text = words(source)
    assert "Verdict: Taken Training would take these rows: nothing was found." in text
    assert all(f"No {level} was found." in text for level in ("problem", "warning", "note"))
    assert 'class="verdict taken"' in source and 'class="state failed"' not in source
    assert "Training would take these rows: 1 warning." in words(check_page(found(finding("warning", "x"))))


def test_problems_that_training_does_not_look_for() -> None:
    source = check_page(found(finding("problem", "2 answers say nothing"), ok=True))
    assert 'class="verdict doubtful"' in source
    assert "Taken, with problems Training would take these rows, but look at what was found: 1 problem." in words(
        source
    )


def test_a_cleaned_file_is_named() -> None:
    fixed = {"path": "clean.jsonl", "dropped_list": "clean.dropped.jsonl", "rows_kept": 792, "rows_dropped": 415}
    text = words(check_page(full() | {"fixed": fixed}))
    assert "A cleaned file was written: 792 rows in clean.jsonl. The 415 left out" in text
    assert "clean.dropped.jsonl" in text


def test_no_model_and_no_rows() -> None:
    lengths = found()["lengths"] | {"unit": "words", "counted_by": None, "limit": None}
    text = words(check_page(found(lengths=lengths)))
    assert "Counted in words, because no model was named" in text and "How long a row may be is not known" in text
    none = lengths | {"histogram": [], "total": 0}
    text = words(check_page(found(lengths=none, rows={"train": 0, "held_out": {}, "wrong": 3})))
    assert "there is no row" in text and "Training rows have" not in text and "Held-out rows0" in text


def test_hostile_text_stays_text() -> None:
    told = hostile(full()["findings"], "findings")
    for item in told:
        item["level"] = "warning"
    values = full() | {"findings": told, "notes": [HOSTILE], "sources": hostile(full()["sources"])}
    values["lengths"] = values["lengths"] | {"counted_by": HOSTILE, "unit": HOSTILE}
    page = Page(check_page(values))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) > 20
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


@pytest.mark.parametrize(
    ("rows", "limit"),
    [((7,), None), ((7,), 5), ((1, 0, 0, 9), 104), ((0, 1), 1), ((3, 4, 100_000), 1_000_000), ((2, 2, 2), 170)],
)
def test_bars_stay_inside_their_frame(rows: tuple[int, ...], limit: int | None) -> None:
    chart = str(histogram_chart(bins(*rows), unit="tokens", limit=limit))
    Page(chart)
    drawn = re.findall(r'<rect x="([\d.]+)%" y="([\d.]+)" width="([\d.]+)%" height="([\d.]+)"', chart)
    assert len(drawn) == sum(count > 0 for count in rows)
    for x, y, width, height in (map(float, bar) for bar in drawn):
        assert x >= 0 and x + width <= 100.01 and y >= 0 and y + height == pytest.approx(240)
        assert height >= 2
    assert not re.search(r"\b(nan|inf|None)\b", chart)


def test_bars_over_the_limit_are_hollow_and_the_limit_is_told_where_it_is_not_drawn() -> None:
    chart = str(histogram_chart(bins(5, 5, 5, 5), unit="tokens", limit=104))
    assert chart.count('stroke-dasharray="4 3"><title>') == 2 and "longer than the limit</li>" in chart
    assert "limit: 104" in chart
    near = str(histogram_chart(bins(5, 5), unit="tokens", limit=120))
    assert "limit: 120" in near and "Every row is within the limit of 120 tokens.<" in near and "legend" not in near
    far = str(histogram_chart(bins(5, 5), unit="tokens", limit=8192))
    assert "limit: 8,192" not in far and "limit of 8,192 tokens. It is too far to the right to be drawn." in far
    below = str(histogram_chart(bins(5, 5), unit="tokens", limit=4))
    assert "Every row is longer than the limit of 4 tokens." in below and "limit: 4" not in below
    one = str(histogram_chart(bins(1, start=9, step=1), unit="words", limit=None))
    assert "Rows have from 9 to 9 words. Most of them: 1 row of 9 words." in one
