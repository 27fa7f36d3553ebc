"""Files larger than memory: JSON piece by piece, positions, archives, standard input, and the hash of what is read."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from reading import JSONL, ROWS, fields, records, refusal, write
from tunesmith.base import InputError
from tunesmith.data.read import Reading, content_hash, open_records, standard_input
from tunesmith.data.record import RowErrors
from tunesmith.data.rows import open_rows


def test_json_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block, and wherever it cuts a value, the rows are the same."""
    rows: list[dict[str, Any]] = [{"n": 10**12 + n, "text": 'é😀\n"' * n, "x": [True, None, -1.5e-7]} for n in range(6)]
    wrapped = {"version": 12345, "note": "[{", "data": rows, "more": {"a": []}, "list": [1, 2]}
    texts = [json.dumps(rows), json.dumps(rows, indent=1), json.dumps(wrapped), json.dumps(wrapped, indent=2)]
    for size in (1, 2, 3, 7, 64, 4096):
        monkeypatch.setattr("tunesmith.data.read_json.CHUNK", size)
        for text in texts:
            assert fields(write(tmp_path / "a.json", text)) == rows
    monkeypatch.setattr("tunesmith.data.read_json.CHUNK", 16)
    error = refusal(write(tmp_path / "b.json", json.dumps(rows, indent=1).replace("true", "tru", 1)))
    assert ":6: not JSON: Expecting value at column 4" in error.what


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('[{"a": 1}', ":1", "Expecting ',' or ']'"),
        ('[{"a": 1}, ]', ":1", "Expecting value"),
        ('[{"a": 1}]\n[', ":2", "Extra data"),
        ('{"data": [{"a": 1}, {"a": 2, "a": 3}]}', ":2", "'a' stands twice"),
        ('{"data": [{"a": 1}], "data": [{"a": 1}]}', ":1", "'data' stands twice"),
        ('{"data": [{"a": 1}], 5: 1}', ":1", "Expecting property name"),
        ('[{"a": 1}, {"a": "\\udc00"}]', ":2", "surrogate"),
        ('[{"a": ' + "9" * 5000 + "}]", ":1", "integer string conversion"),
        ('[{"a": ' + "[" * 100_000, ":1", "nested too deeply"),
    ],
)
def test_what_is_broken_in_json_is_named(content: str, where: str, what: str, tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "a.json", content))
    assert what in error.what and f"{tmp_path / 'a.json'}{where}: " in error.what


def test_large_files_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of what Python allocates while rows are read stays far below the size of the file."""
    import tracemalloc

    monkeypatch.setattr("tunesmith.data.read_json.CHUNK", 1 << 16)
    row = {"prompt": "why " * 50, "completion": "because " * 50}
    listed = ",\n".join([json.dumps(row)] * 4_000)
    for name, content in (
        ("a.jsonl", listed.replace(",\n", "\n")),
        ("a.json", f"[{listed}]"),
        ("b.json", f'{{"data": [{listed}]}}'),
        ("a.csv", "prompt,completion\n" + f"{row['prompt']},{row['completion']}\n" * 4_000),
        ("a.txt", f"{row['prompt']}\n\n" * 8_000),
    ):
        path = write(tmp_path / name, content)
        tracemalloc.start()
        count = sum(1 for _ in open_records(Reading(path), RowErrors()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count >= 4_000
        assert peak < Path(path).stat().st_size / 2, name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_the_position_goes_from_nothing_to_all(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    if name.endswith("parquet"):
        Dataset.from_list(ROWS * 500).to_parquet(path)
    else:
        write(tmp_path / name, gzip.compress((JSONL * 500).encode()) if name.endswith("gz") else JSONL * 500)
    stream = open_rows(Reading(path), RowErrors())
    seen = [stream.position() for _ in stream]
    of = 1000 if name.endswith("parquet") else Path(path).stat().st_size
    assert [position[0] for position in seen] == sorted(position[0] for position in seen)
    assert stream.position() == (of, of) and {position[1] for position in seen} == {of}


def test_a_compressed_parquet_file(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    whole = (tmp_path / "a.parquet").read_bytes()
    assert fields(write(tmp_path / "b.parquet.gz", gzip.compress(whole))) == ROWS
    assert refusal(write(tmp_path / "c.parquet.gz", gzip.compress(whole)[:-20])).what.startswith("cannot be read")
    assert refusal(write(tmp_path / "d.parquet", whole[:-20])).what.startswith("not a Parquet file")


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    if sys.version_info < (3, 14):
        monkeypatch.setattr("tunesmith.data.compressed.find_spec", lambda name: None)
        error = refusal(str(path))
        assert "needs the package zstandard" in error.what and "pip install zstandard" in (error.fix or "")
        monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.ZstdCompressor().compress(JSONL.encode())
    path.write_bytes(frame + frame)
    assert fields(str(path)) == ROWS + ROWS
    for damaged in (JSONL.encode(), frame[: len(frame) // 2], frame + frame[:-3]):
        path.write_bytes(damaged)
        assert refusal(str(path)).what.startswith("cannot be read")


class Piped:
    """Standard input that something is piped into, or not."""

    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer, self._terminal = io.BytesIO(content), terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("content", [JSONL, "\n \n" + json.dumps(ROWS), "\ufeff" + JSONL])
def test_standard_input(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.stdin", Piped(content.encode()))
    standard_input.cache_clear()
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert content_hash(Reading("-")) == digest
    assert fields("-") == fields("-") == ROWS, "read as often as it is needed"
    assert str(records("-")[0].source) == "stdin:1"
    assert [file.name for file in (tmp_path / "stdin").iterdir()] == [digest]


def test_standard_input_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    for piped, what in (
        (Piped(b"", terminal=True), "nothing is piped into standard input"),
        (None, "nothing is piped into standard input"),
        (Piped(b"{}"), "standard input cannot be stored"),
    ):
        monkeypatch.setattr("sys.stdin", piped)
        standard_input.cache_clear()
        assert what in refusal("-").what
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.stdin", Piped(b"\n"))
    standard_input.cache_clear()
    assert refusal("-").what == "the file holds no rows"
    standard_input.cache_clear()


def test_settings_of_the_hub_are_refused_for_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", JSONL)
    assert "`split` is for data sets of the hub" in refusal(path, split="train").what
    assert "`subset` is for data sets of the hub" in refusal(path, subset="main").what


def test_the_content_hash_is_of_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", JSONL)
    assert content_hash(Reading(path)) == hashlib.sha256(JSONL.encode()).hexdigest()
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    first = content_hash(Reading(str(tmp_path / "saved")))
    assert first == content_hash(Reading(str(tmp_path / "saved")))
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert first != content_hash(Reading(str(tmp_path / "saved")))
    with pytest.raises(InputError):
        content_hash(Reading(str(tmp_path / "missing.jsonl")))
