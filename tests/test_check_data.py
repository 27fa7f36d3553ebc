"""`tunesmith data check`: what it finds, what it writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.cli import main
from tunesmith.data.spec import DataSpec
from tunesmith.pipeline.checking import Checked, check_data, counting_model, write_fixed

LONG = (
    "the quick brown fox jumps over the lazy dog while seven wizards quietly brew a potion of purple smoke and two "
    "old sailors count the lamps along a harbour wall until the last ship of the evening has come in from the sea"
)


def check(path: Path, *held: Path, **data: Any) -> Checked:
    return check_data(DataSpec(train=str(path), **data), held=[str(other) for other in held])


def kinds(checked: Checked) -> dict[str, int]:
    return {finding.kind: finding.rows for finding in checked.findings}


def test_a_clean_file(tmp_path: Path) -> None:
    checked = check(write_jsonl(tmp_path / "rows.jsonl", colour_rows(30)))
    assert not checked.refused and not {"empty", "duplicates", "leakage", "wrong-rows"} & set(kinds(checked))
    lengths = checked.as_json()["lengths"]
    assert lengths["unit"] == "words" and sum(entry["rows"] for entry in lengths["histogram"]) == 30


def test_everything_at_once_is_found_counted_and_left_out(tmp_path: Path) -> None:
    rows = [*colour_rows(30), *colour_rows(2), {"prompt": "Say it", "completion": " "}]
    rows += [{"prompt": LONG, "completion": "one"}, {"prompt": LONG + " today", "completion": "one"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "not json\n" + '{"prompt": 1.5, "completion": {}}\n')
    held = write_jsonl(tmp_path / "held.jsonl", [{**row, "prompt": row["prompt"].upper()} for row in colour_rows(4)])
    spec = DataSpec(train=str(path))
    checked = check(path, held)
    found = kinds(checked)
    assert checked.refused
    assert {name: found[name] for name in ("wrong-rows", "empty", "duplicates", "leakage", "near-duplicates")} == {
        "wrong-rows": 2,
        "empty": 1,
        "duplicates": 2,
        "leakage": 4 + 2,
        "near-duplicates": 1,
    }
    fixed = write_fixed(checked, spec, tmp_path / "clean.jsonl")
    assert (fixed.kept, fixed.dropped) == (27, 10)
    reasons = [json.loads(line) for line in fixed.dropped_path.read_text().splitlines()]
    assert {reason["source"].rpartition(":")[2] for reason in reasons} == {
        "1",
        "2",
        "3",
        "4",
        *map(str, [31, 32, 33, 35, 36, 37]),
    }
    again = check(tmp_path / "clean.jsonl", held)
    assert not again.refused and not {"wrong-rows", "empty", "duplicates", "leakage", "near-duplicates"} & set(
        kinds(again)
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["good", "empty", "broken", "twin"]), min_size=1, max_size=12))
def test_every_row_is_kept_or_listed_with_a_reason(tmp_path: Path, sorts: list[str]) -> None:
    lines = []
    for at, sort in enumerate(sorts):
        row = {"prompt": f"Say {at} of {LONG[at:]}", "completion": f"{at} times"}
        lines.append(
            {"good": row, "empty": {**row, "completion": ""}, "twin": {"prompt": "a", "completion": "b"}}.get(sort)
        )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join("{]\n" if line is None else json.dumps(line) + "\n" for line in lines))
    if all(line is None for line in lines):
        with pytest.raises(InputError):
            check(path)
        return
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    (tmp_path / "out.dropped.jsonl").unlink(missing_ok=True)
    fixed = write_fixed(check(path), DataSpec(train=str(path)), out)
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert fixed.kept + fixed.dropped == len(sorts) and len(kept) == fixed.kept
    assert all(row in lines for row in kept), "rows keep their own columns and values"


def test_columns_of_a_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,question,answer\n1,What is red?,A colour.\n2,,Nothing asked.\n")
    spec = DataSpec(train=str(path), columns={"prompt": "question", "completion": "answer"})
    fixed = write_fixed(check_data(spec), spec, tmp_path / "clean.jsonl")
    assert [json.loads(line) for line in fixed.path.read_text().splitlines()] == [
        {"id": "1", "question": "What is red?", "answer": "A colour."}
    ]


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", colour_rows(5))
    checked = check(path)
    before = path.read_text()
    for out, said in (
        (path, "exists already"),
        (tmp_path / "clean.csv", "JSON lines"),
        (tmp_path / "no" / "x.jsonl", "cannot be written"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            write_fixed(checked, DataSpec(train=str(path)), out)
        assert caught.value.fix
    assert path.read_text() == before and sorted(item.name for item in tmp_path.iterdir()) == ["rows.jsonl"]


def test_tokens_are_counted_by_the_model_that_is_named(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*colour_rows(20), {"prompt": "Say " + LONG * 9, "completion": "X"}])
    spec = DataSpec(train=str(path))
    checked = check_data(spec, counting=counting_model(str(tiny_model), spec))
    assert checked.refused and kinds(checked)["overlong"] == 1 and checked.lengths.unit == "tokens"
    assert not check_data(
        spec.model_copy(update={"overlong": "drop"}), counting=counting_model(str(tiny_model), spec)
    ).refused


def test_pairs_and_labelled_words_can_be_checked(tmp_path: Path) -> None:
    pairs = [{"prompt": f"Q{at}", "chosen": f"good {at}", "rejected": f"bad {at}"} for at in range(6)]
    assert not check(write_jsonl(tmp_path / "pairs.jsonl", pairs)).refused
    words = [{"tokens": ["Ann", "went", str(at)], "ner_tags": ["P", "O", "O"]} for at in range(6)]
    assert not check(write_jsonl(tmp_path / "words.jsonl", words)).refused


def run(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["tunesmith", "data", "check", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code if isinstance(left.value.code, int) else 0


def test_the_command_line(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*colour_rows(20), {"prompt": "Say it", "completion": ""}])
    recipe = {"model": str(tiny_model), "data": {"train": "rows.jsonl", "empty": "drop"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(tmp_path, monkeypatch, "rows.jsonl", "--model", str(tiny_model)) == 2
    shown = capsys.readouterr().out
    assert "rows.jsonl:21: the answer is empty" in shown and "training would refuse these rows" in shown
    assert run(tmp_path, monkeypatch, "--recipe", "recipe.yaml", "--json", "--html", "page.html") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and [finding["kind"] for finding in found["findings"]][:1] == ["empty"]
    assert "rows.jsonl:21" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert run(tmp_path, monkeypatch, "rows.jsonl", "--fix", "clean.jsonl", "--model", str(tiny_model)) == 0
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 20
    assert run(tmp_path, monkeypatch) == 2 and "nothing to check" in capsys.readouterr().err
    assert run(tmp_path, monkeypatch, "row.jsonl") == 2 and "'rows.jsonl'" in capsys.readouterr().err
