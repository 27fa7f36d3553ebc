"""Every kind of file, and every way in which one can be broken: an error names file, line and what was found."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from reading import JSONL, ROWS, fields, lines, refusal, write
from tunesmith.base import InputError
from tunesmith.data.read import Reading, open_records
from tunesmith.data.record import SHOWN_ERRORS, RowErrors
from tunesmith.data.rows import open_rows

CSV = 'prompt,completion\nSay hé,HÉ\n"with ""quotes"", commas\nand lines",x\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("rows.ndjson", JSONL),
        ("ROWS.JSONL", JSONL),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", JSONL),
        ("rows.json", json.dumps({"version": "1.0", "count": 2, "data": ROWS})),
        ("rows.csv", CSV),
        ("rows.tsv", CSV.replace("prompt,c", "prompt\tc").replace("hé,", "hé\t").replace('",x', '"\tx')),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "bom", "crlf", ".gz", ".bz2", ".xz"])
def test_a_text_file_of_any_kind_gives_its_rows(name: str, content: str, variant: str, tmp_path: Path) -> None:
    raw = content.encode()
    if variant == "bom":
        raw = b"\xef\xbb\xbf" + raw
    elif variant == "crlf" and "csv" not in name and "tsv" not in name:  # there it would stand inside a cell
        raw = raw.replace(b"\n", b"\r\n")
    elif variant in (".gz", ".bz2", ".xz"):
        raw = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[variant].compress(raw)
        name += variant
    assert fields(write(tmp_path / name, raw)) == ROWS


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    assert lines(write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}\n{"a": 3}')) == [2, 5, 6]
    assert lines(write(tmp_path / "b.json", '[{"a": 1},\n\n{"a": 2}]')) == [1, 2]
    # two line ends in quotes, an empty line between rows, and one in front of the header
    text = '\n"a\nb",c\n1,2\n\n"x\n\ny",z\n3,4\n'
    assert lines(write(tmp_path / "c.csv", text)) == [4, 6, 9]
    assert fields(str(tmp_path / "c.csv"))[1] == {"a\nb": "x\n\ny", "c": "z"}
    assert lines(write(tmp_path / "d.csv", text.replace("\n", "\r\n"))) == [4, 6, 9]


def test_plain_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\nFirst line\nsecond line\n \n\nAnother\n"
    expected = [{"text": "First line\nsecond line"}, {"text": "Another"}]
    for name, content in (("a.txt", text), ("b.md", text.replace("\n", "\r\n")), ("c.txt", text.replace("\n", "\r"))):
        path = write(tmp_path / name, content)
        assert fields(path) == expected
        assert lines(path) == [3, 7]


def test_parquet_and_directories_of_datasets(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "answers": [["x", "y"], None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    expected = [{"prompt": "a", "answers": ["x", "y"]}, {"prompt": "b", "answers": None}]
    assert fields(str(tmp_path / "rows.parquet")) == expected
    Dataset.from_list(expected).save_to_disk(str(tmp_path / "saved"))
    assert fields(str(tmp_path / "saved")) == expected
    assert lines(str(tmp_path / "saved")) == [1, 2]


def test_class_labels_are_read_by_their_names(tmp_path: Path) -> None:
    """A model that learnt to say 1 instead of `positive` would look trained and be useless."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = Dataset.from_dict({"text": ["good", "bad", "?"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        assert [row["label"] for row in fields(str(path))] == ["positive", "negative", None]


def test_a_directory_with_several_splits_is_named_by_split(tmp_path: Path) -> None:
    data = Dataset.from_list([{"a": 1}])
    other = Dataset.from_list([{"a": 2}])
    DatasetDict({"dev": data, "test": other}).save_to_disk(str(tmp_path / "saved"))
    error = refusal(f"{tmp_path / 'saved'}/")
    assert "several splits: dev, test, and no 'train'" in error.what and error.fix
    assert fields(error.fix.split()[-1]) == [{"a": 1}]
    assert fields(str(tmp_path / "saved"), split="test") == [{"a": 2}]
    assert "did you mean 'dev'?" in refusal(str(tmp_path / "saved"), split="deev").what
    assert "there is no 'dev' in it" in refusal(str(tmp_path / "saved" / "dev"), split="dev").what


def test_the_split_train_is_read_unless_another_is_named(tmp_path: Path) -> None:
    splits = {name: Dataset.from_list([{"text": name}]) for name in ("test", "train")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    stream = open_records(Reading(str(tmp_path / "saved")), RowErrors())
    assert [record.fields for record in stream] == [{"text": "train"}]
    assert stream.notes == [f"{tmp_path / 'saved'}: read the split 'train', not test"]
    assert open_records(Reading(str(tmp_path / "saved"), split="test"), RowErrors()).notes == []


def test_broken_lines_are_all_counted_and_the_first_twenty_shown(tmp_path: Path) -> None:
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "a", \n'
    path = write(tmp_path / "rows.jsonl", good + bad * 25 + "[1]\n" + good)
    error = refusal(path)
    shown = error.what.splitlines()
    assert shown[0].startswith(f"{path}:2: not JSON: ") and "column" in shown[0]
    assert len(shown) == SHOWN_ERRORS + 2
    assert shown[-2:] == ["… and 6 more", "26 rows are wrong"]
    assert error.fix == "every line of a JSONL file is one JSON object", "said once, not 26 times"


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.jsonl", '{"a": 1}\n"text"\n', ":2", "expected an object with named fields, found str"),
        ("a.jsonl", '{"a": 1}\nnull\n', ":2", "found NoneType"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', ":1", "'a' stands twice"),
        ("a.jsonl", '{"a": "\\ud83d"}\n', ":1", "surrogate"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", ":1", "integer string conversion"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", ":1", "nested too deeply"),
        ("a.jsonl", '[\n{"a": 1},\n{"a": 2}\n]\n', ":1", "not JSON"),
        ("a.json", '[{"a": 1},\n{"a": }]', ":2", "not JSON"),
        ("a.json", '[{"a": 1}, 5, "x"]', ":2", "found int"),
        ("a.json", '{"a": 1}\n{"a": \n', ":2", "not JSON"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "", "several lists of rows: train, test"),
        ("a.json", "5", "", "expected a list of objects, found int"),
        ("a.json", '"text"', "", "expected a list of objects, found str"),
        ("a.csv", "a,b\n1,2\n3\n4,5,6\n", ":3", "1 cells where the header has 2 columns"),
        ("a.csv", "a,b\n1,2\n\n3,4,5\n", ":4", "3 cells where the header has 2 columns"),
        ("a.csv", 'a,b\n1,2\n"open,3\n4,5\n', ":3", "not well-formed CSV"),
        ("a.csv", 'a,b\n1,2\n"x"y,3\n', ":3", "not well-formed CSV"),
        ("a.csv", "text,label,text\n1,2,3\n", ":1", "the column 'text' stands twice"),
        ("a.csv", "text;label\nx;y\n", ":1", "separated by ';'"),
        ("a.tsv", "text,label\nx,y\n", ":1", "separated by ','"),
        ("a.csv", "text\tlabel\nx\ty\n", ":1", r"separated by '\t'"),
    ],
)
def test_what_is_broken_is_named_with_its_line(name: str, content: str, where: str, what: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / name, content))
    assert what in error.what
    assert f"{tmp_path / name}{where}" in str(error)


def test_a_json_value_over_several_lines_is_recognised(tmp_path: Path) -> None:
    assert "name the file .json" in str(refusal(write(tmp_path / "a.jsonl", json.dumps(ROWS, indent=2))))
    assert "name the file .json" in str(refusal(write(tmp_path / "b.jsonl", json.dumps(ROWS[0], indent=2))))
    assert "name the file .json" not in str(refusal(write(tmp_path / "c.jsonl", JSONL + "{")))


def test_one_object_is_one_row(tmp_path: Path) -> None:
    """Neither several good answers nor the turns of a conversation are rows of their own."""
    for row in (
        {"prompt": "a", "completion": ["x", "y"]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    ):
        assert fields(write(tmp_path / "a.json", json.dumps(row))) == [row]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "0xe9"), ("cp437", "0x82")])
def test_another_encoding_is_named_with_its_line(name: str, encoding: str, shown: str, tmp_path: Path) -> None:
    body = '{"a": 1}\n{"a": 2}\n{"a": "é"}\n' if name.endswith("jsonl") else 'a,b\n1,2\n3,"é"\n'
    if name.endswith("json"):
        body = '[{"a": 1},\n{"a": 2},\n{"a": "é"}]'
    error = refusal(write(tmp_path / name, body.encode(encoding)))
    assert str(error).startswith(f"{tmp_path / name}:3: not UTF-8: byte {shown}\n1 row is wrong")
    assert error.fix == "save the file as UTF-8"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf_16_and_32_are_named(name: str, encoding: str, tmp_path: Path) -> None:
    raw = ("" if encoding in ("utf-16", "utf-32") else "\ufeff") + "a,b\n1,2\n"
    content = raw.encode(encoding)
    error = refusal(write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content))
    assert error.what == f"this is {encoding[:6].upper()}, by its byte-order mark"
    assert error.where == f"{tmp_path / name}:1" and error.fix == "save the file as UTF-8"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_nul_byte_is_no_text(name: str, tmp_path: Path) -> None:
    content = b"a,b\nx,y\n1,\x002\n"
    if name == "a.jsonl":
        content = b'{"a": 1}\n\n{"a": "\x00"}\n'
    elif name == "a.json":
        content = b'[{"a": 1}, {"a": \n\n"\x00"}]'
    error = refusal(write(tmp_path / name, content))
    assert f"{tmp_path / name}:3: a NUL byte, which is no text" in error.what
    unmarked = refusal(write(tmp_path / name, content.replace(b"\0", b"").decode().encode("utf-16-le")))
    assert f"{tmp_path / name}:1: a NUL byte, which is no text (UTF-16" in unmarked.what


def test_a_wrong_line_does_not_hide_the_others(tmp_path: Path) -> None:
    """Every row that is wrong is counted in one pass, and the rows that are right are there."""
    errors = RowErrors()
    stream = open_records(Reading(write(tmp_path / "a.csv", b'a,b\n1\n\xe9,2\n3,"x"y\n5,6\n')), errors)
    assert [record.fields for record in stream] == [{"a": "5", "b": "6"}]
    assert [line.partition("a.csv:")[2][:1] for line in errors.shown] == ["2", "3", "4"]
    with pytest.raises(InputError) as caught:
        errors.raise_any("and this")
    assert caught.value.fix is not None
    assert [line.strip()[:20] for line in caught.value.fix.splitlines()] == [
        "every row needs as m",
        "→ save the file as U",
        "→ put cells that con",
        "→ and this",
    ]


def test_a_byte_order_mark_is_passed_over_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "x"}\n')
    stream = open_rows(Reading(path), RowErrors())
    assert [row.text for row in stream] == ["x"]
    assert f"{path}: its UTF-8 byte-order mark was passed over" in stream.notes


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_refused(name: str, content: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / name, content))
    assert error.what == "the file holds no rows" and error.where == str(tmp_path / name)


def test_a_header_without_rows_and_an_empty_table_are_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.csv", "text,label\n")).what == "the file holds no rows"
    assert refusal(write(tmp_path / "a.json", "[]")).what == "the file holds no rows"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert refusal(str(tmp_path / "a.parquet")).what == "the file holds no rows"


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", JSONL)
    error = refusal(str(tmp_path / "trian.jsonl"))
    assert error.what == "no such file; did you mean 'train.jsonl'?"
    assert "did you mean 'alpaca'?" in refusal("alpca").what and "ultrafeedback" in (refusal("alpca").fix or "")
    for missing in ("nowhere/at/all.jsonl", "data.jsonl", "~nobody-here/x.jsonl", "x" * 300, "text with words"):
        assert refusal(missing).what.startswith("no such file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_named_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    error = refusal(str(tmp_path / "rows.jsonl"))
    assert "no regular file" in error.what and "name - as the path" in (error.fix or "")


def test_a_folder_that_is_here_settles_that_a_name_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("data/train").what.startswith("no such file")
    assert refusal("owner/train.csv.gz").what.startswith("no such file")


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.gz", "rows.jsonl.zip", "rows.pkl"])
def test_an_unknown_ending_is_refused(name: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / name, JSONL))
    assert error.what.startswith("unknown kind of file") and error.where == str(tmp_path / name)
    assert ".jsonl" in (error.fix or "")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_damaged_archive_is_refused(ending: str, tmp_path: Path) -> None:
    whole = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(JSONL.encode() * 50)
    for damaged in (JSONL.encode(), whole[: len(whole) // 2], whole[:30] + b"\xff" * 20 + whole[50:]):
        error = refusal(write(tmp_path / f"rows.jsonl{ending}", damaged))
        assert error.what.startswith("cannot be read")


def test_a_file_that_is_no_parquet_and_a_directory_that_is_no_data_set(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.parquet", JSONL)).what.startswith("not a Parquet file")
    error = refusal(str(tmp_path))
    assert error.what.startswith("not a directory written by datasets") and error.where == str(tmp_path)


def test_long_cells_are_no_error(tmp_path: Path) -> None:
    document = "word " * 50_000
    assert fields(write(tmp_path / "a.csv", f"text,label\n{document},x\n"))[0]["text"] == document


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "a": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
                "b": st.text('ab\n\r",;\t '),
            }
        ),
        min_size=1,
        max_size=8,
    )
)
def test_rows_survive_a_file(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    import csv

    directory = tmp_path_factory.getbasetemp()
    jsonl = "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows)
    assert fields(write(directory / "property.jsonl", jsonl)) == rows
    assert fields(write(directory / "property.json", json.dumps(rows))) == rows
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["a", "b"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    assert fields(write(directory / "property.csv", text.getvalue())) == rows
