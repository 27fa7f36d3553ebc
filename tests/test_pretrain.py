"""Continued pretraining: documents in blocks, nothing lost or seen across a boundary, judged per token and byte."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS, build_model, colour_rows, write_jsonl
from steps import assert_same, gradients, split
from tiny import tiny
from tunesmith.base import InputError, silent
from tunesmith.batch import pack
from tunesmith.data.blocks import Blocks, laid_together, pieces_of
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.render_documents import DocumentRenderer
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.answers import row_nlls
from tunesmith.methods import Full, Lora
from tunesmith.models.forward import next_token_logits
from tunesmith.objectives import Pretrain
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe_file import check_recipe


def documents(count: int = 30) -> list[dict[str, str]]:
    """Texts of very different lengths, all different."""
    return [
        {"text": f"{at} " + " ".join(WORDS[(at * step + step) % len(WORDS)] for step in range(3 + (at * 37) % 160))}
        for at in range(count)
    ]


def prepared(path: Path, model: Path, **settings: Any) -> Prepared:
    tokenizer = AutoTokenizer.from_pretrained(model)
    spec = DataSpec.model_validate({"train": str(path), "max_length": 48, "checks": False, **settings})
    renderer = DocumentRenderer.of(spec, tokenizer, {2})
    return prepare(spec, renderer, model_limit=256, seed=0, wants_test=False, progress=silent)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docs.jsonl", documents())


def recipe(model: Path, corpus: Path, output: Path, **sections: Any) -> Any:
    values = {
        "model": str(model),
        "data": {"train": str(corpus), "max_length": 48, "test": 0.2, "checks": False},
        "objective": "pretrain",
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "dtype": "fp32", "checkpoint_every": 2},
        "evaluate": {"resamples": 20, "forgetting": "off"},
        "output": str(output),
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    return check_recipe(values, "test")


# --- nothing is lost and nothing is doubled ---


@pytest.mark.parametrize("block", [2, 3, 7, 64])
def test_every_token_behind_the_first_is_a_target_of_exactly_one_piece(block: int) -> None:
    lengths = np.array([2, 3, 7, 8, 13, 14, 64, 65, 127, 200])
    pieces = pieces_of(lengths, block)
    found = Counter(
        (int(row), int(at)) for row, start, length in pieces for at in range(int(start) + 1, int(start + length))
    )
    assert found == Counter((row, at) for row, length in enumerate(lengths) for at in range(1, length))
    assert pieces["length"].min() >= 2 and pieces["length"].max() <= block
    whole = pieces["row"][:-1] == pieces["row"][1:]
    assert (pieces["length"][:-1][whole] == block).all()  # only a document's end is shorter


def test_a_block_of_one_token_has_no_target() -> None:
    with pytest.raises(ValueError, match="no target"):
        pieces_of(np.array([4]), 1)


def test_pieces_are_laid_together_by_best_fit() -> None:
    # By hand: 6 opens one, 5 another; 4 goes into the fuller (room 4), 3 beside the 5, 2 fills that up.
    assert laid_together([2, 6, 4, 5, 3], 10) == [[1, 2], [3, 4, 0]]
    lengths = np.random.default_rng(0).integers(2, 65, 400).tolist()
    blocks = laid_together(lengths, 64)
    assert sorted(at for block in blocks for at in block) == list(range(400))
    assert all(sum(lengths[at] for at in block) <= 64 for block in blocks)
    assert sum(lengths) / (64 * len(blocks)) > 0.94


def test_every_token_of_every_document_is_trained_on_once_an_epoch(tiny_model: Path, corpus: Path) -> None:
    found = prepared(corpus, tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected, trained = Counter[int](), Counter[int]()
    for row in documents():
        expected.update(tokenizer(row["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    for at in found.order.rows(0, found.order.epoch_rows):
        example = found.train[at].example
        assert len(example) == found.train.lengths[at] <= 48
        assert example.targets == found.train.targets[at]
        trained.update(example.token_ids[example.tensors["target_weights"] > 0].tolist())
    assert trained == expected
    manifest = found.manifest()
    assert manifest["target_tokens_used"] == sum(expected.values()) and manifest["rows_used"] == 30
    assert manifest["rows_lost"] == manifest["target_tokens_lost"] == 0
    assert manifest["blocks"]["full"] > 0.9
    assert any("every token is trained on once" in note for note in found.notes)


def test_pieces_spell_the_document(tiny_model: Path, corpus: Path) -> None:
    """Laid in their order without the repeated token they are the document; the opening is context only."""
    found = prepared(corpus, tiny_model, validation=str(corpus), overlap="keep").validation
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    end = tokenizer.eos_token_id
    for at, row in enumerate(documents()):
        example = found[at].example
        ids = [end, *tokenizer(row["text"], add_special_tokens=False)["input_ids"], end]
        targets = example.token_ids[example.tensors["target_weights"] > 0]
        assert targets.tolist() == ids[1:]
        for start, length, parent in example.own_segments().tolist():
            assert parent == -1 and length <= 48
            assert example.tensors["target_weights"][start] == 0
        assert example.positions().max() < 48


def test_blocks_end_like_a_list(tiny_model: Path, corpus: Path) -> None:
    train = prepared(corpus, tiny_model).train
    assert isinstance(train, Blocks)
    assert len(list(train)) == len(train)
    with pytest.raises(IndexError):
        train[len(train)]


def test_sources_keep_their_shares_of_blocks(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "general.jsonl", [{"text": f"general {row['text']}"} for row in documents(20)])
    found = prepared(corpus, tiny_model, replay={"path": str(other), "share": 0.25})
    epoch = found.order.rows(0, found.order.epoch_rows)
    replayed = [at for at in epoch if found.train[at].row.source.file == str(other)]
    task = found.mixture[0]["places"]
    assert len(replayed) == round(task / 3) and len(epoch) == task + len(replayed)
    assert task == found.mixture[0]["rows"]  # all of it, once
    assert isinstance(found.train, Blocks)
    for at in range(len(found.train)):
        documents_of = found.train._documents.numbers[found.train._laid.of(at)["row"]]
        assert len(set(found.train.stored.rows.index["source"][documents_of])) == 1


# --- documents see nothing of each other ---


def test_documents_in_a_block_do_not_attend_to_each_other(tiny_model: Path, corpus: Path) -> None:
    train = prepared(corpus, tiny_model).train
    block = next(item.example for item in train if item.example.segments is not None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = pack([block])
    together = next_token_logits(model, batch, torch.arange(batch.tokens)).detach()
    for start, length, _ in block.own_segments().tolist():
        alone = pack(block.apart())  # the same pieces as rows of their own
        assert alone.tokens == batch.tokens
        with torch.no_grad():
            model.set_attn_implementation("eager")
            piece = model(input_ids=block.token_ids[None, start : start + length]).logits[0]
        torch.testing.assert_close(together[start : start + length], piece, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_packed_is_padded_and_splitting_changes_nothing(method: Any, tiny_model: Path, corpus: Path) -> None:
    train = prepared(corpus, tiny_model).train
    rows = [item.example for item in train][-8:]
    assert any(row.segments is not None for row in rows)
    model = tiny(vocab_size=400).train()
    method.adapt(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    whole, one = gradients(model, Pretrain(), split(rows, [range(8)], "packed"))
    for layout, parts in (
        ("padded", [range(8)]),
        ("packed", [[0, 5, 6], [1], [7, 2, 3, 4]]),
        ("padded", [[0, 1], range(2, 8)]),
    ):
        found, other = gradients(model, Pretrain(), split(rows, parts, layout))
        assert other.targets == one.targets and other.loss == pytest.approx(one.loss, rel=1e-5)
        assert_same(found, whole, 1e-4)


# --- what it is judged by ---


def test_perplexity_and_bits_per_byte_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """Against transformers' own forward pass over each piece."""
    texts = ["red blue", "grün und blau, " * 12]
    path = write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in texts])
    run = finetune(
        recipe(tiny_model, path, tmp_path / "run", data={"train": str(path), "test": str(path), "overlap": "keep"})
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    end, nll, tokens = tokenizer.eos_token_id, 0.0, 0
    for text in texts:
        ids = torch.tensor([end, *tokenizer(text, add_special_tokens=False)["input_ids"], end])
        for start in range(0, len(ids) - 1, 47):
            piece = ids[start : start + 48]
            with torch.no_grad():
                logits = model(input_ids=piece[None]).logits[0, :-1]
            nll += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            tokens += len(piece) - 1
    size = sum(len(text.encode()) for text in texts)
    assert size > sum(map(len, texts))  # bytes are no characters
    report = run.report
    assert report is not None
    found = {entry["name"]: entry for entry in report["metrics"]}
    assert found["perplexity"]["base"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["bits_per_byte"]["base"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert found["perplexity"]["n"] == 2 and found["perplexity"]["primary"]
    assert {entry["better"] for entry in found.values()} == {"lower"}


def test_the_likelihood_of_a_document_is_that_of_its_pieces_in_both_layouts(tiny_model: Path, corpus: Path) -> None:
    rows = prepared(corpus, tiny_model, validation=str(corpus), overlap="keep").validation
    examples = [item.example for item in rows]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    packed = row_nlls(model, examples, packed=True, progress=silent)
    padded = row_nlls(model, examples, packed=False, progress=silent)
    apart = [sum(row_nlls(model, example.apart(), packed=False, progress=silent)) for example in examples]
    assert packed == pytest.approx(padded, rel=1e-4) and packed == pytest.approx(apart, rel=1e-4)


# --- whole runs ---


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "modules_to_save": ["embed_tokens"]}])
def test_a_run_learns_and_its_report_shows_what_general_text_paid(
    method: dict[str, Any], tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    general = tmp_path / "general.txt"
    general.write_text("The quick brown fox jumps over the lazy dog.\n\nAnother passage of text.\n" * 4)
    train = {"steps": 20, "best": "last"}
    run = finetune(
        recipe(tiny_model, corpus, tmp_path / "run", method=method, train=train, evaluate={"forgetting": str(general)})
    )
    report = run.report
    assert report is not None
    perplexity, bits = report["metrics"]
    assert perplexity["name"] == "perplexity" and perplexity["high"] < 0 and bits["high"] < 0
    assert report["forgetting"]["status"] == "measured" and report["forgetting"]["low"] is not None
    assert report["verdict"] == "ship"
    rates = [event["learning_rate"] for event in run.events() if event["event"] == "step"]
    assert rates[0] < rates[1]  # it warms up from zero again
    resolved = {item["name"]: item for item in run.read("plan.json")["resolved"]}
    assert resolved["evaluate.metrics"]["value"] == ["perplexity", "bits_per_byte"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_gives_the_same_bytes(method: str, tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    import os
    import signal

    from tunesmith.base import Interrupted
    from tunesmith.pipeline.finetune import Watcher

    def once(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    straight = finetune(recipe(tiny_model, corpus, tmp_path / "straight", method=method))
    broken = recipe(tiny_model, corpus, tmp_path / "broken", method=method)
    with pytest.raises(Interrupted):
        finetune(broken, watcher=Watcher(event=once))
    again = finetune(broken, resume=True)
    assert straight.result is not None and again.result is not None
    for path in straight.result.glob("*.safetensors"):
        assert path.read_bytes() == (again.result / path.name).read_bytes()


def test_head_alone_reads_its_features_of_blocks(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    run = finetune(recipe(tiny_model, corpus, tmp_path / "run", method="head", train={"steps": 8}))
    assert run.report is not None and run.report["metrics"][0]["difference"] < 0


def test_text_and_markdown_files_are_documents(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("\n\n".join(row["text"] for row in documents(8)), encoding="utf-8")
    found = prepared(
        tmp_path / "a.txt", tiny_model, train=[str(tmp_path / "a.txt"), str(tmp_path / "b.md")], duplicates="keep"
    )
    assert found.manifest()["rows_used"] == 16


# --- errors ---


@pytest.mark.parametrize(
    ("sections", "where", "said"),
    [
        ({"data": {"train": "CHAT"}}, "chat.jsonl", "'prompt-completion', which this objective does not use"),
        ({"data": {"answer_after": "A: "}}, "data.answer_after", "reads documents whole"),
        ({"data": {"template": "plain"}}, "data.template", "reads documents whole"),
        ({"data": {"overlong": "drop"}}, "data.overlong", "cuts them into blocks"),
        ({"data": {"max_length": 1}}, "data.max_length", "no target"),
        ({"evaluate": {"metrics": ["rougeL"]}}, "evaluate.metrics", "documents have no answers"),
        ({"gate": {"f1": 0.1}}, "gate", "documents have no answers"),
        ({"evaluate": {"max_new_tokens": 8}}, "evaluate.max_new_tokens", "no answers"),
        ({"data": {"validation": 0.2}, "train": {"generate_every": 2}}, "train.generate_every", "no answers"),
    ],
)
def test_what_has_no_meaning_for_documents_is_refused(
    sections: dict[str, Any], where: str, said: str, tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", colour_rows(12))
    sections = json.loads(json.dumps(sections).replace("CHAT", str(chat)))
    with pytest.raises(InputError) as error:
        finetune(recipe(tiny_model, corpus, tmp_path / "run", **sections))
    assert where in str(error.value.where) and said in error.value.what
    if "CHAT" in where or "chat" in where:
        assert "objective.kind: sft" in (error.value.fix or "")
    assert not (tmp_path / "run").exists()


def test_sft_on_raw_text_stays_as_it_was(tmp_path: Path, corpus: Path) -> None:
    model = build_model(tmp_path / "model", max_position_embeddings=1024)
    run = finetune(recipe(model, corpus, tmp_path / "run", objective="sft", data={"max_length": "auto"}))
    report = run.report
    assert report is not None and report["data"]["blocks"] is None
    assert [entry["name"] for entry in report["metrics"]] == ["perplexity"]


def test_a_finished_run_is_judged_on_other_documents(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    from tunesmith.pipeline.loaded import compare_with_base
    from tunesmith.recipe import EvaluateSpec

    run = finetune(recipe(tiny_model, corpus, tmp_path / "run", method="full", train={"best": "last"}))
    assert run.report is not None
    again = write_jsonl(tmp_path / "again.jsonl", documents(12))
    [found] = compare_with_base(str(run.path), [DataSpec(train=str(again))], EvaluateSpec(resamples=20))
    entries = {entry["name"]: entry for entry in found["metrics"]}
    assert entries.keys() == {"perplexity", "bits_per_byte"} and entries["perplexity"]["n"] == 12
    assert entries["perplexity"]["difference"] < 0
    chat = write_jsonl(tmp_path / "chat.jsonl", colour_rows(4))
    [found] = compare_with_base(str(run.path), [DataSpec(train=str(chat))], EvaluateSpec(resamples=20, rows=2))
    assert "bits_per_byte" not in {entry["name"] for entry in found["metrics"]}


def test_blocks_are_shown(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    from tunesmith.cli.show import described, first_or_worst

    found = prepared(corpus, tiny_model)
    for worst in (None, "longest", "most-cut", "fewest-targets"):
        chosen = first_or_worst(found.train, 3, worst)
        assert [described(found.train[at], AutoTokenizer.from_pretrained(tiny_model)) for at in chosen]
