"""`data show` shows the trainer's own ids and weights, and says in signs what it says in colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from chat_templates import FAMILIES, tokenizer
from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError, Source
from tunesmith.cli.show import _listed, _short_sources, described, show_rows
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.rows import Row
from tunesmith.models.templates import resolve_template
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import read_recipe
from tunesmith.train.batches import StepBatches

ODD = [
    {"prompt": "Sag 日本語 🙂👩‍👩‍👧", "completion": "é́ ﷽ 🇩🇪 né"},
    {"prompt": "tab\tand\r\nbell\x07\x1b[31m red", "completion": "line\nbreak"},
    {"prompt": "say <|im_end|> now", "completion": "no <|im_start|>"},
]


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show")
    rows = [*ODD, *colour_rows(3), {"prompt": "Say long", "completion": "LONG " * 60}]
    values = {
        "model": str(tiny_model),
        "data": {"train": [str(write_jsonl(root / "rows.jsonl", rows))], "max_length": 100, "overlong": "truncate"},
        "evaluate": "off",
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def shown(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **options: Any) -> str:
    given: dict[str, Any] = {"rows": 20, "worst": None, "packing": False, "html": None, "as_json": False, **options}
    capsys.readouterr()
    show_rows(read_recipe(recipe, overrides), **given)
    return capsys.readouterr().out


def test_tokens_are_those_of_the_trainer(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(shown(recipe, capsys, as_json=True))["rows"]
    prepared = plan_job(read_recipe(recipe)).prepared
    assert prepared is not None and len(rows) == len(prepared.train) == 7
    for row, item in zip(rows, prepared.train, strict=True):
        used = len(item.example)
        assert [token["id"] for token in row["tokens"]] == [*item.example.token_ids.tolist(), *item.cut_ids]
        weights = item.example.tensors["target_weights"].tolist()
        assert [token["state"] for token in row["tokens"]][:used] == ["trained" if w else "masked" for w in weights]
        assert {token["state"] for token in row["tokens"][used:]} <= {"cut"}
        assert row["source"] == str(item.row.source)
        assert row["summary"] == f"{item.example.targets} trained, {used - item.example.targets} masked, " + (
            f"{len(item.cut_ids)} cut"
        )
        assert [token["text"] for token in row["tokens"] if token["special"]][:2] == ["<|im_start|>", "<|im_end|>"]
    assert len(prepared.train[-1].cut_ids) > 50
    assert len(json.loads(shown(recipe, capsys, as_json=True, rows=2))["rows"]) == 2


def test_text_is_whole_and_readable_without_colour(
    recipe: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(recipe, capsys)
    assert "\x1b" not in text, "a pipe gets neither colours nor what the data would do to a terminal"
    assert text.startswith("⟦trained⟧ masked ⟪cut⟫\n7 of 7 training rows, in the order of the files\n")
    assert "rows.jsonl:1: " in text
    first = text.split("rows.jsonl:1: ")[1].split("\n\n")[0]
    assert "Sag 日本語 🙂👩‍👩‍👧<|im_end|>↵\n<|im_start|>assistant↵\n⟦é́ ﷽ 🇩🇪 né<|im_end|>⟧↵" in first
    second = text.split("rows.jsonl:2: ")[1].split("\n\n")[0]
    assert "tab⇥" in second and "and␍↵\nbell␇␛[31m red" in second and "⟦line↵\nbreak<|im_end|>⟧" in second
    long = text.split("rows.jsonl:7: ")[1].split("\n\nno row is left out")[0]
    assert long.count("⟦") == long.count("⟧") == 1 and long.rstrip().endswith("⟫") and "⟧⟪" in long
    of = AutoTokenizer.from_pretrained(tiny_model)
    spelled = of.apply_chat_template(
        [{"role": "user", "content": "Say long"}, {"role": "assistant", "content": "LONG " * 60}], tokenize=False
    )
    bare = long.split("\n", 1)[1].rstrip("\n")
    for sign in "⟦⟧⟪⟫↵":
        bare = bare.replace(sign, "")
    assert bare.rstrip() == spelled.rstrip()


def test_literal_control_tokens_are_told_from_real_ones(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    third = shown(recipe, capsys).split("rows.jsonl:3: ")[1].split("\n\n")[0]
    assert "‹<|im_start|>›user↵\nsay <|im_end|> now‹<|im_end|>›↵" in third
    assert "⟦no <|im_start|>‹<|im_end|>›⟧" in third


def one(family: str, question: str, answer: str) -> tuple[Rendered, Any]:
    of = FAMILIES[family].tokenizer()
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    here = Renderer(resolve_template("auto", of), of, "answers", {of.eos_token_id})
    return here.render(Row(Source("rows", 1), turns, references=(answer,))), of


@pytest.mark.parametrize("family", ["chatml", "llama-3", "mistral", "mistral-metaspace", "gemma", "zephyr"])
@pytest.mark.parametrize("text", ["What is it?", "日本語 🙂 é", "  two  blanks ", "a\n\n b"])
def test_pieces_make_up_the_text(family: str, text: str) -> None:
    item, of = one(family, text, text)
    row = described(item, of)
    spelled = "".join(token["text"] for token in row["tokens"])
    assert spelled == of.decode(item.example.token_ids, clean_up_tokenization_spaces=False)
    assert spelled.count(text.strip()) == 2 and "\ufffd" not in spelled
    special = {token["text"].strip() for token in row["tokens"] if token["special"]}
    assert special <= set(FAMILIES[family].controls) and FAMILIES[family].ending in special
    assert all(token["text"] for token in row["tokens"] if token["special"])


def test_a_character_of_several_tokens_is_shown_with_its_last() -> None:
    of = tokenizer(("</s>",), None, "</s>", None)
    here = Renderer(resolve_template("plain", of), of, "answers", {of.eos_token_id})
    item = here.render(
        Row(
            Source("a", 1),
            ({"role": "user", "content": "x"}, {"role": "assistant", "content": "🙂"}),
            references=("🙂",),
        )
    )
    pieces = [token["text"] for token in described(item, of)["tokens"]]
    assert pieces == ["x", *[""] * (len(pieces) - 3), "🙂", "</s>"] and len(pieces) > 4


def test_a_character_that_is_cut_in_two_and_one_that_is_meant() -> None:
    of = tokenizer(("</s>",), None, "</s>", None)
    here = Renderer(resolve_template("plain", of), of, "answers", {of.eos_token_id})
    text = "a \ufffd b"
    item = here.render(
        Row(
            Source("a", 1),
            ({"role": "user", "content": text}, {"role": "assistant", "content": text}),
            references=(text,),
        )
    )
    assert "".join(token["text"] for token in described(item, of)["tokens"]) == text + text + "</s>"
    emoji = of("🙂", add_special_tokens=False)["input_ids"]
    texts = described(Rendered(item.row, item.example, (), tuple(emoji[:2])), of)["tokens"]
    assert texts[-1]["text"] == "\ufffd" and texts[-1]["state"] == "cut"


def test_long_rows_are_shown_at_once() -> None:
    """Decoding every beginning of a row of 4,000 tokens takes a minute."""
    import time

    item, of = one("chatml", "word " * 6000, "yes")
    start = time.perf_counter()
    row = described(item, of)
    assert len(row["tokens"]) > 6000
    assert time.perf_counter() - start < 10


def test_the_page(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tokens.html"
    assert shown(recipe, capsys, html=target) == f"wrote {target}\n"
    page = target.read_text(encoding="utf-8")
    assert f"Tokens of {recipe.parent / 'rows.jsonl'}" in page and "日" in page
    with pytest.raises(InputError, match="the page cannot be written") as caught:
        shown(recipe, capsys, html=tmp_path / "nowhere" / "tokens.html")
    assert caught.value.fix and caught.value.where == str(tmp_path / "nowhere" / "tokens.html")


def test_overrides_are_seen(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = json.loads(shown(recipe, capsys, "data.train_on=everything", as_json=True, rows=1))["rows"]
    assert [token["state"] for token in everything[0]["tokens"]][:2] == ["masked", "trained"]


@pytest.fixture(scope="module")
def uneven(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths: two are cut, one stands twice."""
    root = tmp_path_factory.mktemp("uneven")
    long = [{"prompt": "Say long", "completion": "LONG " * count} for count in (50, 60)]
    values = {
        "model": str(tiny_model),
        "data": {
            "train": [str(write_jsonl(root / "rows.jsonl", [*long, *colour_rows(12), colour_rows(1)[0]]))],
            "max_length": 100,
            "overlong": "truncate",
        },
        "train": {"batch_size": 6, "micro_batch": 4, "steps": 4},
        "evaluate": "off",
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def sources(found: dict[str, Any]) -> list[int]:
    return [int(row["source"].rpartition(":")[2]) for row in found["rows"]]


def test_worst_rows_come_first(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def worst(kind: str) -> dict[str, Any]:
        return json.loads(shown(uneven, capsys, as_json=True, worst=kind, rows=5))

    longest = worst("longest")
    sizes = [len(row["tokens"]) for row in longest["rows"]]
    assert sources(longest)[:2] == [2, 1] and sizes == sorted(sizes, reverse=True), "by what stands in the file"
    cut = [row["cut"] for row in worst("most-cut")["rows"]]
    assert cut == sorted(cut, reverse=True) and cut[1] > 0 == cut[2]
    targets = [row["trained"] for row in worst("fewest-targets")["rows"]]
    everything = json.loads(shown(uneven, capsys, as_json=True))["rows"]
    assert targets == sorted(row["trained"] for row in everything)[:5]
    text = shown(uneven, capsys, worst="most-cut", rows=2)
    assert "2 of 14 training rows, the most cut first" in text and text.index("jsonl:2: ") < text.index("jsonl:1: ")
    assert "none of them cut" in shown(uneven, capsys, "data.max_length=auto", worst="most-cut")


def test_blocks_are_those_of_the_trainer(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(uneven, capsys, as_json=True, packing=True, rows=1))["packing"]
    planned = plan_job(read_recipe(uneven))
    assert planned.prepared is not None
    batches = StepBatches.of_job(planned.recipe, planned.plan, planned.prepared.train, planned.prepared.order)
    for step in (1, 2, 3):
        here = [block for block in found if block["step"] == step]
        made = batches(step)
        assert [block["tokens"] for block in here] == [batch.tokens for batch in made]
        assert [len(block["rows"]) for block in here] == [batch.rows for batch in made] == [4, 2]
        for block, batch in zip(here, made, strict=True):
            lengths = batch.segments[:, 1]
            assert block["padding"] == 0 and block["layout"] == batch.layout == "packed"
            assert block["padding_if_padded"] == int(lengths.max()) * len(lengths) - int(lengths.sum())
    assert len(found) == 6 and len({row for block in found for row in block["rows"]}) == 14, (
        "an epoch is every row once"
    )
    assert json.loads(shown(uneven, capsys, as_json=True, rows=1))["packing"] == []


def test_blocks_as_text(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(uneven, capsys, packing=True, rows=1)
    assert "blocks of the first 3 optimizer steps: packed, tested when the model is loaded\n" in text
    assert "step  block  rows  tokens  padding  which\n   1      1     4  " in text
    assert text.count("rows.jsonl:") >= 18 and "…" not in text.split("blocks of")[1], "a pipe gets every row"
    assert "nothing is padded; laid out as a rectangle each, the blocks would have " in text
    padded = shown(uneven, capsys, "train.packing=false", packing=True, rows=1)
    assert "optimizer steps: padded\n" in padded and " tokens of padding, " in padded
    blocks = json.loads(shown(uneven, capsys, "train.packing=false", packing=True, as_json=True))["packing"]
    assert all(block["padding"] == block["padding_if_padded"] for block in blocks)
    assert any(block["padding"] for block in blocks)


def test_names_are_cut_to_the_width_of_a_terminal() -> None:
    names = [f"rows.jsonl:{at}" for at in range(1, 9)]
    assert _listed(names, None) == ", ".join(names)
    assert _listed(names, 45) == "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, …" and len(_listed(names, 45)) <= 45
    assert _listed(names, 3) == "rows.jsonl:1, …" and _listed(names[:1], 3) == "rows.jsonl:1"
    blocks = [{"rows": ["a/x.jsonl:1", "a/y.jsonl:2"]}]
    assert _short_sources(blocks) == {"a/x.jsonl:1": "x.jsonl:1", "a/y.jsonl:2": "y.jsonl:2"}
    same = _short_sources([{"rows": ["a/x.jsonl:1", "b/x.jsonl:1"]}])
    assert same == {"a/x.jsonl:1": "a/x.jsonl:1", "b/x.jsonl:1": "b/x.jsonl:1"}


def test_rows_that_are_left_out_are_told(uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = json.loads(shown(uneven, capsys, as_json=True, rows=1))["lost"]
    assert {entry["reason"]: entry["rows"] for entry in lost} == {"duplicate": 1, "cut at the end of the answer": 0}
    text = shown(uneven, capsys, rows=1)
    targets = sum(entry["target_tokens"] for entry in lost)
    assert f"\n\n1 row left out of training; {targets} target tokens lost\n  duplicate: 1 row, " in text
    assert "rows.jsonl:15\n  cut at the end of the answer: " in text
    dropped = shown(uneven, capsys, "data.overlong=drop", rows=1)
    assert "3 rows left out of training" in dropped and "overlong: 2 rows, " in dropped
    shown(uneven, capsys, html=tmp_path / "page.html", packing=True)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1 row left out of training" in page and "Rows are packed, tested when the model is loaded." in page
