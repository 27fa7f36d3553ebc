"""Rows and tokens on disk: the same as in memory, found again by content, and never mixed up."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import build_tokenizer, colour_rows, write_jsonl
from tunesmith.base import InputError, silent
from tunesmith.data import cache
from tunesmith.data.ingest import ingest
from tunesmith.data.read import Reading
from tunesmith.data.render import Renderer
from tunesmith.data.stored import RenderedRows, Stored
from tunesmith.data.token_file import tokens_of
from tunesmith.models.templates import resolve_template


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def renderer(place: Path, template: str = "auto") -> Renderer:
    tokenizer = build_tokenizer(place / "tokenizer")
    return Renderer(resolve_template(template, tokenizer), tokenizer, "answers", {int(tokenizer.eos_token_id)})


def stored(path: Path, of: Renderer) -> Stored:
    rows = ingest([(Reading(str(path)), "train")], silent).rows
    return Stored(rows, tokens_of(rows, of, silent))


def entries(place: Path) -> set[str]:
    return {item.name for item in (place / "cache").iterdir() if item.is_dir()}


def test_what_is_read_back_is_what_was_rendered(place: Path) -> None:
    of, path = renderer(place), write_jsonl(place / "rows.jsonl", colour_rows(50))
    kept = RenderedRows(stored(path, of), np.arange(50))
    for number, item in enumerate(kept):
        again = of.render(item.row)
        assert item.row.source.line == number + 1
        assert torch.equal(item.example.token_ids, again.example.token_ids)
        assert torch.equal(item.example.tensors["target_weights"], again.example.tensors["target_weights"])
        assert item.prompt_ids == again.prompt_ids and item.row.references == again.row.references
        assert (kept.lengths[number], kept.targets[number]) == (len(again.example), again.example.targets)


def test_an_entry_is_found_again_by_content_tokenizer_and_template(place: Path) -> None:
    path = write_jsonl(place / "rows.jsonl", colour_rows(9))
    stored(path, renderer(place))
    first = entries(place)
    stored(path, renderer(place))
    assert entries(place) == first and len(first) == 2
    stored(path, renderer(place, "zephyr"))
    assert len(entries(place)) == 3, "the same rows, other tokens"
    write_jsonl(path, colour_rows(9, start=4))
    rows = stored(path, renderer(place))
    assert len(entries(place)) == 5 and rows.rows[0].messages[0]["content"] == colour_rows(1, start=4)[0]["prompt"]


def test_a_renderer_learns_from_the_cache_what_it_would_have_learned(place: Path) -> None:
    path = write_jsonl(place / "rows.jsonl", colour_rows(5))
    first, second = renderer(place), renderer(place)
    stored(path, first)
    stored(path, second)
    assert (first.stop_ids, first.notes, first.used_controls) == (second.stop_ids, second.notes, second.used_controls)


def test_other_code_never_meets_old_entries(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(place / "rows.jsonl", colour_rows(5))
    stored(path, renderer(place))
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    stored(path, renderer(place))
    assert len(entries(place)) == 4


def test_nothing_is_left_of_what_could_not_be_made(place: Path) -> None:
    def broken(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise InputError("no")

    with pytest.raises(InputError):
        cache.cached({"a": 1}, broken)
    assert entries(place) == set()


def test_the_oldest_go_when_there_is_too_much(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(directory: Path) -> None:
        (directory / "data").write_bytes(bytes(1000))

    made = [cache.cached({"number": number}, fill) for number in range(4)]
    old = time.time() - 2 * cache.UNTOUCHED_SECONDS
    for at, path in enumerate(made[:3]):
        os.utime(path, (old + at, old + at))
    monkeypatch.setattr(cache, "KEPT_BYTES", 3000)
    cache.forget_unused(place / "cache")
    assert [path.is_dir() for path in made] == [False, True, True, True]
    monkeypatch.setattr(cache, "KEPT_BYTES", 0)
    cache.forget_unused(place / "cache")
    assert [path.is_dir() for path in made] == [False, False, False, True], "what was used today stays"


def test_a_cache_that_cannot_be_written_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(place / "file" / "cache"))
    with pytest.raises(InputError, match="cannot be kept on disk") as caught:
        cache.cached({}, lambda _: None)
    assert "TUNESMITH_DATA_CACHE" in str(caught.value.fix)
