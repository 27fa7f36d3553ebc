from __future__ import annotations

import gc
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.base import InputError
from tunesmith.data import general_text, stdlib_docstrings
from tunesmith.data.stdlib_docstrings import INSTRUCTION, house_style, write_demo_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    # Without this the collector walks all of torch again and again while syntax trees come and go.
    gc.freeze()
    counts = write_demo_data(directory)
    gc.unfreeze()
    rows = {
        side: [json.loads(line) for line in (directory / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]
        for side in ("train", "validation", "test")
    }
    return counts, rows


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the number of open files.", "Returns the number of open files"),
        ("Returns the name of the file", "Returns the name of the file"),
        ("Try to read ``size`` bytes.\n\nMore.", "Tries to read size bytes"),
        ("True if the file is closed.", "Returns True if the file is closed"),
        ("Return true if the file is closed.", "Returns True if the file is closed"),
        ("Recursively delete a directory tree.", "Recursively deletes a directory tree"),
        ("Flush and close the file.", "Flushes and closes the file"),
        ("Clear the queue and return its items.", "Clears the queue and returns its items"),
        ("Compare a and b (lists of lines); return a delta.", "Compares a and b (lists of lines) and returns a delta"),
        ("Get a variable, returns None if it doesn't exist.", "Gets a variable, returning None if it doesn't exist"),
        ("Wrap a :class:`~asyncio.Task` in a future (for tests).", "Wraps a Task in a future"),
        ("Internal: raise an error if the file is closed", "Raises an error if the file is closed"),
        ("Helper function to parse the header of a file.", "Parses the header of a file"),
        ("Shutdown the manager process\nThis may take long.", "Shuts down the manager process"),
    ],
)
def test_house_style(docstring, summary):
    assert house_style(docstring) == summary


@pytest.mark.parametrize(
    ("docstring", "reason"),
    [
        ("Initializer.", "does not begin with a verb"),
        ("List of names of the files", "may be a noun"),
        ("Return the file.", "too few or too many"),
        ("Return " + "very " * 20 + "much.", "too few or too many"),
        ("Return what you asked me for.", "speaks to the reader"),
        ("Return a > b.", "markup or code"),
        ("Return one of these values:\n\n- a", "introduces a list"),
        ("Open the file if it is there and return it.", "second verb"),
        ("Return the value of 'name and more.", "unbalanced"),
        ("Return the object that it belongs to.", "without its object"),
        ("multiply multiplies two operands.", "function's name"),
        ("", "does not begin with a verb"),
    ],
)
def test_sentences_that_do_not_fit_are_refused_by_name(docstring, reason):
    with pytest.raises(ValueError, match=reason):
        house_style(docstring)


def test_there_are_enough_rows(demo):
    counts, rows = demo
    assert counts["train"] == len(rows["train"]) >= 1000
    assert counts["test"] == len(rows["test"]) >= 100
    assert counts["validation"] == len(rows["validation"]) == 60
    assert counts["modules"] > 50
    assert sum(counts["dropped"].values()) > 0


def test_rows_keep_the_house_style(demo):
    _, rows = demo
    for row in (row for side in rows.values() for row in side):
        assert list(row) == ["completion", "prompt"]
        words = row["completion"].split()
        assert 4 <= len(words) <= 20
        assert words[0][0].isupper()
        assert any(word.endswith("s") for word in words[:2])
        assert not row["completion"].endswith((".", ":", ","))
        assert not re.search(r"[`*|\\]|>>>|\n", row["completion"])
        assert row["prompt"].startswith(INSTRUCTION + "\n\n")
        assert re.search(r"^\s*(async )?def \w+\(", row["prompt"], re.MULTILINE)
        assert len(row["prompt"]) < 900


def test_nothing_stands_on_two_sides_or_twice(demo):
    _, rows = demo
    prompts = Counter(folded(row["prompt"]) for side in rows.values() for row in side)
    assert prompts.most_common(1)[0][1] == 1
    answers = {side: {folded(row["completion"]) for row in rows[side]} for side in rows}
    assert not answers["train"] & answers["test"]
    assert not answers["train"] & answers["validation"]
    assert not answers["validation"] & answers["test"]
    assert len(answers["test"]) == len(rows["test"])


def library(root: Path, functions: int = 6) -> Path:
    for module in ("alpha", "beta", "gamma"):
        source = "".join(
            f'def {module}_{i}(x):\n    """Return the {module} number {i} of x.\n\n    More.\n    """\n'
            f"    # Return nothing\n    return x + {i}\n\n"
            for i in range(functions)
        )
        (root / f"{module}.py").write_text(source)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text('def f(x):\n    """Return the skipped number."""\n    return x\n')
    (root / "broken.py").write_text("def f(:\n")
    (root / "danger.py").write_text("raise SystemExit('imported')\n")
    return root


@pytest.fixture
def small(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    root.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library(root) if not any(root.iterdir()) else root))
    monkeypatch.setattr(stdlib_docstrings, "FEWEST_TRAIN_ROWS", 1)
    monkeypatch.setattr(stdlib_docstrings, "TEST_ROWS", 4)
    monkeypatch.setattr(stdlib_docstrings, "VALIDATION_ROWS", 3)
    return tmp_path


def test_modules_do_not_straddle_and_the_same_seed_gives_the_same_bytes(small):
    names = ("train.jsonl", "validation.jsonl", "test.jsonl")
    counts = write_demo_data(small / "a")
    write_demo_data(small / "b")
    assert [(small / "a" / n).read_bytes() for n in names] == [(small / "b" / n).read_bytes() for n in names]
    modules = [set(re.findall(r"def (\w+)_\d", (small / "a" / n).read_text())) for n in names]
    assert all(len(found) == 1 for found in modules)
    assert len(set.union(*modules)) == 3
    assert counts["dropped"]["file cannot be parsed"] == 1
    assert "skipped" not in "".join((small / "a" / n).read_text() for n in names)
    splits = set()
    for seed in range(8):
        write_demo_data(small / "c", seed=seed)
        splits.add((small / "c" / "test.jsonl").read_text().split("_")[0])
    assert len(splits) > 1


def test_the_docstring_is_not_in_the_prompt(small):
    write_demo_data(small)
    row = json.loads((small / "train.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(re.escape(INSTRUCTION) + r"\n\ndef \w+\(x\):\n    return x \+ \d", row["prompt"])


def test_other_files_in_the_directory_stay(small):
    (small / "recipe.yaml").write_text("mine")
    write_demo_data(small)
    assert (small / "recipe.yaml").read_text() == "mine"


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="training rows"):
        write_demo_data(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_general_text_is_prose():
    name, passages = general_text.general_text()
    assert "Python" in name
    assert 40_000 < sum(map(len, passages)) < 80_000
    assert len(set(passages)) == len(passages)
    assert all(1000 <= len(passage) <= 2000 for passage in passages)
    assert not re.search(r"::=|>>>|^\.\. |====|\*\*\*\*", "\n".join(passages), re.MULTILINE)
    assert general_text.general_text() == (name, passages)
    assert len(general_text.general_text(5_000)[1]) < 6


def test_general_text_falls_back_and_then_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(general_text, "_topics", list)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("os.__file__", str(tmp_path / "os.py"))
    with pytest.raises(InputError, match="no general text"):
        general_text.general_text()
    with pytest.raises(InputError, match="positive"):
        general_text.general_text(0)
    for number in range(6):
        sentence = f"This module number {number} describes what it does in words that anybody can read with ease. "
        paragraphs = "\n\n".join(sentence + "It says so " + "again and " * (30 + i) + "again." for i in range(4))
        (tmp_path / f"module{number}.py").write_text(f'"""{paragraphs}"""')
    name, passages = general_text.general_text()
    assert name.endswith("module descriptions")
    assert len(passages) == 6


@pytest.mark.demo
def test_rows_fit_the_demo_model(demo, demo_directory):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_directory)
    _, rows = demo
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for side in rows.values()
        for row in side
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert max(lengths) <= 180
    assert sum(length <= 160 for length in lengths) > 0.99 * len(lengths)
