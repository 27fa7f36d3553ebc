"""Models that judge: what transformers and PEFT make of the files, and whole jobs by every method."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from conftest import write_jsonl
from task_rows import COLOURS, build_trunk, write_rows
from tunesmith.base import InputError
from tunesmith.batch import Example, pack
from tunesmith.data.spec import DataSpec
from tunesmith.methods import Full, trainable_parameters
from tunesmith.methods.method import settle
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.load import Loading, load_judge
from tunesmith.models.sentence_settings import read_sentence_settings
from tunesmith.models.task_head import (
    TaskHead,
    head_modules,
    outputs_of,
    row_features,
    saved_head,
    settled_pooling,
    token_features,
)
from tunesmith.objectives import Classify, Regress, Tag
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import compare_with_base, evaluate, load, load_labeller, load_speaker
from tunesmith.pipeline.merging import merge_run
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.run import TUNED_EVALUATION

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = Loading(torch.float32, torch.device("cpu"))
HEAD = TaskHead("sequence", ("a", "b", "c"))
LENGTHS = (9, 5, 14)


def rows_of(vocabulary: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [Example(torch.randint(5, vocabulary, (length,), generator=generator)) for length in LENGTHS]


FAMILIES = ("bert", "roberta", "electra", "distilbert", "modernbert", "deberta-v2", "llama")


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_head_computes_what_transformers_computes(model_type: str, kind: Any, tmp_path: Path) -> None:
    path = build_trunk(tmp_path, model_type)
    torch.manual_seed(0)
    model, head, new, _ = load_judge(str(path), TaskHead(kind, ("a", "b", "c")), FP32)
    assert new
    rows = rows_of(60)
    obstacle = packing_obstacle(model)
    assert (obstacle is None) == (model_type not in ("roberta", "deberta-v2"))  # positions of their own
    with torch.no_grad():
        expected = [model(input_ids=row.token_ids[None]).logits[0] for row in rows]
        for layout in ("padded", "packed") if obstacle is None else ("padded",):
            batch = pack(rows, layout)
            if kind == "sequence":
                found = list(outputs_of(model, row_features(model, batch, head)))
            else:
                everywhere = torch.arange(batch.tokens)
                found = list(outputs_of(model, token_features(model, batch, everywhere, head)).split(LENGTHS))
            for one, other in zip(found, expected, strict=True):
                assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_pooling_reads_what_it_says(layout: Any, tmp_path: Path) -> None:
    model, *_ = load_judge(str(build_trunk(tmp_path)), HEAD, FP32)
    rows = rows_of(60)
    trunk: Any = model.base_model
    with torch.no_grad():
        runs = [trunk(input_ids=row.token_ids[None], output_hidden_states=True) for row in rows]
        for layer in (None, 1):
            states = [run.last_hidden_state[0] if layer is None else run.hidden_states[layer][0] for run in runs]
            wanted = {
                "mean": [s.mean(0) for s in states],
                "cls": [s[0] for s in states],
                "last": [s[-1] for s in states],
            }
            for pooling, expected in wanted.items():
                head = TaskHead("sequence", ("a", "b", "c"), pooling=pooling, layer=layer)  # type: ignore[arg-type]
                found = row_features(model, pack(rows, layout), head)
                assert torch.allclose(found, torch.stack(expected), atol=1e-5), (pooling, layer)


def test_settings_for_sentences_choose_the_pooling(tmp_path: Path) -> None:
    path = build_trunk(tmp_path)
    assert load_judge(str(path), HEAD, FP32)[1].pooling == "pooler"
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert load_judge(str(path), HEAD, FP32)[1].pooling == "mean"
    (path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(InputError, match="settings for sentences"):
        load_judge(str(path), HEAD, FP32)


def test_settings_for_sentences_of_a_hub_id_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache, where the hub puts the files of a model; and when nobody can tell, it is said."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--org--encoder"
    trunk = build_trunk(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_judge(str(trunk), HEAD, FP32).model
    unknown = settled_pooling(HEAD, model, [], "org/encoder", None)
    assert (unknown.pooling, unknown.why) == ("pooler", "the model's own pooler")
    assert unknown.note is not None and "1_Pooling/config.json" in unknown.note and "not in the cache" in unknown.note
    (cache / ".no_exist" / commit / "1_Pooling").mkdir(parents=True)
    (cache / ".no_exist" / commit / "1_Pooling" / "config.json").touch()
    assert settled_pooling(HEAD, model, [], "org/encoder", None).note is None, "the hub has said that there are none"
    shutil.rmtree(cache / ".no_exist")
    (trunk / "1_Pooling").mkdir()
    (trunk / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    found = settled_pooling(HEAD, model, [], "org/encoder", None)
    assert (found.pooling, found.note) == ("mean", None)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (EntryNotFoundError("no"), None),
        (OSError("the line is cut\nand more"), "the line is cut"),
    ],
    ids=["there is none", "no answer"],
)
def test_what_the_hub_answers(error: Exception, note: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **settings: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = read_sentence_settings("org/nobody-has-this")
    assert (found.pooling, found.unknown) == (None, note)


def test_a_head_of_the_same_size_for_other_labels_is_not_taken_over(tmp_path: Path) -> None:
    path = build_trunk(tmp_path / "trunk")
    model, *_ = load_judge(str(path), HEAD, FP32)
    model.save_pretrained(tmp_path / "saved")
    again, _, new, _ = load_judge(str(tmp_path / "saved"), HEAD, FP32)
    assert not new
    assert torch.equal(again.get_parameter("classifier.weight"), model.get_parameter("classifier.weight"))
    other, _, new, _ = load_judge(str(tmp_path / "saved"), TaskHead("sequence", ("x", "y", "z")), FP32)
    assert new
    assert not torch.equal(other.get_parameter("classifier.weight"), model.get_parameter("classifier.weight"))


class TestLosses:
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor([0, 2, 1, 1, 0, 2])

    def batch(self, labels: Tensor) -> Any:
        examples = [
            Example(
                torch.arange(4),
                {"target_weights": torch.tensor([0, 0, 0, 1.0]), "labels": labels[at : at + 1]},
                {"target_weights": "token", "labels": "target"},
            )
            for at in range(len(labels))
        ]
        return pack(examples)

    def total(self, objective: Any, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        monkeypatch.setattr(type(objective), "outputs", lambda self, model, batch: TestLosses.outputs)
        batch = self.batch(labels)
        found: Any = torch.nn.Module()
        return objective.loss(found, batch)["nll"] / objective.weights(batch)["nll"]

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("weights", ["none", {"a": 2.0, "c": 0.5}])
    def test_labels(self, smoothing: float, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        objective = Classify(labels=["a", "b", "c"], class_weights=weights, label_smoothing=smoothing)
        found = self.total(objective, self.numbers, monkeypatch)
        given = torch.tensor([2.0, 1.0, 0.5]) if weights != "none" else torch.ones(3)
        each = F.cross_entropy(self.outputs, self.numbers, reduction="none", label_smoothing=smoothing)
        assert found == pytest.approx(float((each * given[self.numbers]).sum() / given[self.numbers].sum()))
        if not smoothing:
            assert found == pytest.approx(float(F.cross_entropy(self.outputs, self.numbers, weight=given)))

    def test_several_labels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        objective = Classify(labels=["a", "b", "c"], multi_label=True)
        labels = F.one_hot(self.numbers, 3).float()
        expected = F.binary_cross_entropy_with_logits(self.outputs, labels)
        assert self.total(objective, labels, monkeypatch) == pytest.approx(float(expected))

    def test_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        expected = F.mse_loss(self.outputs[:, 0], values) / 4
        assert self.total(Regress(spread=2.0), values, monkeypatch) == pytest.approx(float(expected))


def test_balanced_weights_are_rows_over_labels_times_rows_of_the_label() -> None:
    found = Classify(class_weights="balanced").settled([["a"]] * 6 + [["b"]] * 2)
    assert found.labels == ["a", "b"]
    assert found.class_weights == {"a": pytest.approx(8 / 12), "b": pytest.approx(8 / 4)}


def recipe(places: Path, kind: str, method: Any = None, **changes: Any) -> Any:
    objective = {"several": {"kind": "classify", "multi_label": True}}.get(kind, {"kind": kind})
    values: dict[str, Any] = {
        "model": str(places / "bert"),
        "data": {
            "train": str(places / f"{kind}.jsonl"),
            "validation": 0.1,
            "test": 0.2,
            "checks": False,
            **changes.pop("data", {}),
        },
        "objective": {**objective, **changes.pop("objective", {})},
        "method": method or {"kind": "full"},
        "train": {
            "epochs": 12,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "dtype": "fp32",
            "evaluate_every": 20,
            **changes.pop("train", {}),
        },
        "evaluate": {"resamples": 50, "rows": 40},
        **changes,
    }
    return values


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for kind in ("classify", "several", "regress", "tag"):
        write_rows(root, kind, 160)
    build_trunk(root / "bert")
    build_trunk(root / "llama", "llama")
    return root


def run_of(values: dict[str, Any], output: Path) -> Any:
    return finetune(check_recipe({**values, "output": str(output)}, "test"))


def primary(run: Any) -> dict[str, Any]:
    return run.report["metrics"][0]


@pytest.mark.parametrize("trunk", ["bert", "llama"])
@pytest.mark.parametrize(
    ("kind", "metric"),
    [("classify", "accuracy"), ("several", "micro_f1"), ("regress", "rmse"), ("tag", "entity_f1")],
)
def test_every_kind_is_learned_and_read_by_others(
    kind: str, metric: str, trunk: str, places: Path, tmp_path: Path
) -> None:
    # The trunk of this Llama begins at random as its head does, and needs a rate of which ten times is too much.
    rates = (1e-2, 1.0) if trunk == "llama" else (3e-3, 10.0)
    values = recipe(places, kind, model=str(places / trunk), train={"learning_rate": rates[0]})
    values["objective"]["head_rate"] = rates[1]
    run = run_of(values, tmp_path / "run")
    found = primary(run)
    assert found["name"] == metric and run.report["verdict"] == "ship", run.report["sentence"]
    assert found["tuned"] < 0.3 if kind == "regress" else found["tuned"] > 0.9
    assert run.report["forgetting"]["status"] == "off"
    # What transformers makes of the files is what the run said of its held-out rows.
    tokenizer = AutoTokenizer.from_pretrained(run.result)
    said = run.read(TUNED_EVALUATION)["rows"]
    if kind == "tag":
        model = AutoModelForTokenClassification.from_pretrained(run.result).eval()
        assert set(model.config.id2label.values()) == {"B-PER", "O", "B-OBJ", "I-OBJ"}
        return
    model = AutoModelForSequenceClassification.from_pretrained(run.result).eval()
    for row in said[:8]:
        with torch.no_grad():
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0]
        if kind == "classify":
            assert model.config.id2label[int(logits.argmax())] == row["answer"]
            nll = float(F.cross_entropy(logits[None], torch.tensor([model.config.label2id[row["references"][0]]])))
            assert row["nll"] == pytest.approx(nll, abs=1e-4)
        elif kind == "several":
            given = [model.config.id2label[at] for at, value in enumerate(logits) if value > 0]
            assert " | ".join(given) == row["answer"]
            assert model.config.problem_type == "multi_label_classification"
        else:
            assert float(row["answer"]) == pytest.approx(float(logits[0]), abs=1e-4)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 8},
    "dora": {"kind": "lora", "rank": 8, "dora": True},
    "adapter": {"kind": "adapter", "size": 8},
    "parallel": {"kind": "adapter", "size": 8, "placement": "parallel"},
    "ia3": {"kind": "ia3"},
    "loha": {"kind": "peft", "type": "loha", "r": 8, "target_modules": ["query", "value"]},
    "head": {"kind": "head"},
    "biases": {"kind": "full", "weights": "biases"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_beside_the_head(name: str, places: Path, tmp_path: Path) -> None:
    values = recipe(places, "classify", METHODS[name], train={"learning_rate": 1e-2, "epochs": 15})
    run = run_of(values, tmp_path / "run")
    assert primary(run)["tuned"] > 0.6, run.report["sentence"]
    plan = run.read("plan.json")
    assert plan["parameters"]["trainable"] >= 32 * 3 + 3
    again = evaluate(load(run.path, dtype="fp32"), places / "classify.jsonl", EvaluateSpec(rows=40, resamples=20))
    labeller = load_labeller(str(run.path), dtype="fp32")
    assert labeller is not None
    said = run.read(TUNED_EVALUATION)["rows"]
    answers = [one.answer for one in labeller.say([row["prompt"] for row in said])]
    assert answers == [row["answer"] for row in said]
    assert again["accuracy"]["value"] > 0.6


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha"])
def test_peft_reads_adapter_and_head(name: str, places: Path, tmp_path: Path) -> None:
    values = recipe(places, "classify", METHODS[name], train={"steps": 6}, objective={"pooling": "pooler"})
    run = run_of(values, tmp_path / "run")
    model, head, *_ = load_judge(str(places / "bert"), TaskHead("sequence", tuple(sorted(COLOURS))), FP32)
    base = AutoModelForSequenceClassification.from_pretrained(places / "bert", num_labels=3)
    theirs = PeftModel.from_pretrained(base, run.result).eval()
    ours = load(run.path, dtype="fp32")
    row = rows_of(60)[2]
    with torch.no_grad():
        expected = theirs(input_ids=row.token_ids[None]).logits
        found = outputs_of(ours, row_features(ours, pack([row]), head))
    assert torch.allclose(found, expected, atol=1e-4)
    assert set(head_modules(model)) <= set(
        json.loads((run.result / "adapter_config.json").read_text())["modules_to_save"]
    )


def test_a_run_goes_on_to_the_same_bytes(places: Path, tmp_path: Path) -> None:
    values = recipe(places, "classify", METHODS["lora"], train={"steps": 8, "checkpoint_every": 4})
    whole = run_of(values, tmp_path / "whole")
    half = recipe(places, "classify", METHODS["lora"], train={"steps": 8, "checkpoint_every": 4})

    from tunesmith.base import Interrupted
    from tunesmith.pipeline.work import Watcher

    seen: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seen.append(event["step"])
            if event["step"] == 6:
                raise Interrupted("enough")

    with pytest.raises(Interrupted):
        finetune(check_recipe({**half, "output": str(tmp_path / "half")}, "test"), watcher=Watcher(event=stop))
    run = finetune(check_recipe({**half, "output": str(tmp_path / "half")}, "test"), resume=True)
    name = "adapter_model.safetensors"
    assert (run.result / name).read_bytes() == (whole.result / name).read_bytes()


def test_features_are_computed_once(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / "cache"))
    passes = 0
    from transformers.models.bert.modeling_bert import BertModel

    forward = BertModel.forward

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(self, *given, **named)

    monkeypatch.setattr(BertModel, "forward", counted)
    values = recipe(places, "classify", {"kind": "head", "solver": "gradient"}, train={"epochs": 3})
    first = run_of(values, tmp_path / "one")
    after_one, passes = passes, 0
    longer = recipe(places, "classify", {"kind": "head", "solver": "gradient"}, train={"epochs": 9})
    run_of(longer, tmp_path / "two")
    # Nothing but the tests that a head and packed rows are computed rightly runs the trunk again.
    assert passes < after_one < 20
    features = list((tmp_path / "cache").rglob("features.bin"))
    assert len(features) == 3
    assert first.report["metrics"]


def test_features_give_the_head_what_the_trunk_gives(places: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A head trained on kept features is the head that is trained through the trunk."""
    from tunesmith.methods import HeadOnly

    method = {"kind": "head", "solver": "gradient"}
    for kind, trunk in (("classify", "bert"), ("tag", "llama")):
        same = {"objective": {"head_rate": 1.0}, "train": {"steps": 6}, "model": str(places / trunk)}
        values = recipe(places, kind, method, **same)
        kept = run_of(values, tmp_path / f"{kind}-kept")
        with monkeypatch.context() as patch:
            patch.setattr(HeadOnly, "trunk_is_frozen", False)
            through = run_of(values, tmp_path / f"{kind}-through")
        ours, theirs = (
            [event["loss"] for event in run.events() if event["event"] == "step"] for run in (kept, through)
        )
        tolerance = 1e-4 if trunk == "llama" else 0.3  # BERT's own dropout runs in a trunk that trains
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_the_solver_ends_where_no_gradient_is_left(places: Path, tmp_path: Path) -> None:
    values = recipe(places, "classify", {"kind": "head"}, train={"steps": 2})
    run = run_of(values, tmp_path / "run")
    [solved] = [event for event in run.events() if event["event"] == "solver"]
    assert solved["kept"] == "solver" and solved["solver"] < solved["gradient"]
    values = recipe(places, "regress", {"kind": "head"}, train={"steps": 2}, model=str(places / "llama"))
    [solved] = [e for e in run_of(values, tmp_path / "numbers").events() if e["event"] == "solver"]
    assert solved["solver"] < solved["gradient"]


def test_the_head_of_a_model_that_writes(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    values = {
        "model": str(tiny_model),
        "data": {"train": str(rows_file), "test": 0.2, "checks": False},
        "method": {"kind": "head"},
        "train": {"steps": 12, "learning_rate": 1e-2, "batch_size": 8},
        "evaluate": {"rows": 8, "max_new_tokens": 4, "resamples": 20, "forgetting": "off"},
    }
    run = run_of(values, tmp_path / "run")
    losses = [event["loss"] for event in run.events() if event["event"] == "step"]
    assert losses[-1] < losses[0]
    saved = load(run.path)
    assert not saved.config.tie_word_embeddings
    base = load(tiny_model)
    assert torch.equal(saved.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.equal(saved.get_output_embeddings().weight, base.get_output_embeddings().weight)


def test_conversations_are_judged_in_a_template(places: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Name the colour."},
                {"role": "user", "content": f"I want {colour} things {at}"},
                {"role": "assistant", "content": colour},
            ]
        }
        for at, colour in enumerate(COLOURS * 20)
    ]
    write_jsonl(tmp_path / "turns.jsonl", rows)
    data = {"train": str(tmp_path / "turns.jsonl"), "test": 0.2, "checks": False}
    values = recipe(places, "classify", {"kind": "lora"}, model=str(places / "llama"), train={"steps": 30}, data=data)
    with pytest.raises(InputError, match=r"turns\.jsonl:1.*more than one turn"):
        run_of(values, tmp_path / "bare")
    assert not (tmp_path / "bare").exists()
    values["data"]["template"] = "chatml"
    run = run_of(values, tmp_path / "run")
    head = saved_head(run.result)
    assert head is not None and head.asks == "conversation" and head.pooling == "last"


def wrong(places: Path, tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        run_of(recipe(places, changes.pop("kind", "classify"), changes.pop("method", None), **changes), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    return str(caught.value)


def test_bad_combinations_are_one_clear_error(places: Path, tmp_path: Path) -> None:
    llama = str(places / "llama")
    assert "prompt keeps no head" in wrong(places, tmp_path, method={"kind": "prompt"}, model=llama)
    assert "prefix keeps no head" in wrong(places, tmp_path, method={"kind": "prefix"}, model=llama)
    assert "no label 'pink'" in wrong(places, tmp_path, objective={"class_weights": {"pink": 2}})
    assert "2 blocks" in wrong(places, tmp_path, objective={"layer": 3})
    assert "writes no answers" in wrong(places, tmp_path, train={"generate_every": 2})
    assert "gate.forgetting" in wrong(places, tmp_path, gate={"forgetting": 0.05})
    assert "one number is needed, found 'red'" in wrong(
        places, tmp_path, objective={"kind": "regress"}, data={"train": str(places / "classify.jsonl")}
    )
    said = wrong(places, tmp_path, objective={"labels": ["red", "blue"]})
    assert "the label 'green' stands in no training row; labels: red, blue" in said
    assert "this objective does not use" in wrong(places, tmp_path, data={"train": str(places / "tag.jsonl")})
    assert "needs tokenize" not in said


def test_a_row_with_several_labels_names_the_setting(places: Path, tmp_path: Path) -> None:
    data = {"train": str(places / "several.jsonl"), "empty": "drop"}
    assert "set objective.multi_label: true" in wrong(places, tmp_path, data=data)


def test_a_model_that_judges_does_not_chat(places: Path, tmp_path: Path) -> None:
    run = run_of(recipe(places, "classify", {"kind": "lora"}, train={"steps": 3}), tmp_path / "run")
    with pytest.raises(InputError, match="judges and writes nothing"):
        load_speaker(str(run.path))
    [result] = compare_with_base(str(run.path), [DataSpec(train=str(places / "classify.jsonl"))], EvaluateSpec(rows=20))
    assert [entry["name"] for entry in result["metrics"]] == ["accuracy", "macro_f1"]


def test_long_texts_are_cut_before_what_closes_them(places: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{colour} " + "trees " * (at % 30), "label": colour} for at, colour in enumerate(COLOURS * 20)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    data = {
        "train": str(tmp_path / "long.jsonl"),
        "max_length": 12,
        "overlong": "truncate",
        "test": 0.2,
        "checks": False,
    }
    run = run_of(recipe(places, "classify", data=data, train={"steps": 2}), tmp_path / "run")
    manifest = run.read("data.json")
    assert manifest["max_length"] == 12
    assert any("cut" in lost["reason"] for lost in manifest["lost"]) or manifest["tokens"] <= 12 * len(rows)


def test_tags_are_read_at_the_last_token_where_tokens_look_back_only() -> None:
    assert Tag(labels=["O", "B-X"]).metrics == ("entity_f1", "word_accuracy")
    assert Tag(labels=["NOUN", "VERB"]).metrics == ("word_accuracy",)
    assert math.isclose(float(Regress(spread=1.0).encoded(["2.5"], 1)), 2.5)


@pytest.mark.parametrize("kind", ["classify", "regress", "tag"])
def test_a_merged_model_judges_as_its_adapter(kind: str, places: Path, tmp_path: Path) -> None:
    run = run_of(recipe(places, kind, {"kind": "lora"}, train={"steps": 10, "learning_rate": 1e-2}), tmp_path / "run")
    merged = merge_run(str(run.path), tmp_path / "merged")
    assert merged.check.passed and merged.check.same_tokens == 1.0
    texts = ["Ann see red cars 5", "Bob like blue hats 7"]
    said = [load_labeller(str(path), dtype="fp32") for path in (run.path, tmp_path / "merged")]
    one, other = ([judged.answer for judged in labeller.say(texts)] for labeller in said if labeller is not None)
    if kind == "regress":
        assert [float(value) for value in one] == pytest.approx([float(value) for value in other], abs=1e-4)
    else:
        assert one == other


def test_a_configuration_that_cannot_be_read_is_no_missing_head(tmp_path: Path) -> None:
    assert saved_head(tmp_path / "nowhere") is None
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(InputError, match="cannot read the model's configuration"):
        saved_head(tmp_path)


@pytest.mark.parametrize("weights", ["biases", "norms", ".*query.*"])
def test_trained_parts_of_narrow_modules_run_with_and_without_autocast(weights: str, tmp_path: Path) -> None:
    """A bias in fp32 beside its frozen weight in bf16: validation runs without autocast, training with it."""
    narrow = Loading(torch.bfloat16, torch.device("cpu"))
    model, head, *_ = load_judge(str(build_trunk(tmp_path)), HEAD, narrow)
    batch = pack(rows_of(60), "padded")
    with torch.no_grad():
        before = outputs_of(model, row_features(model, batch, head)).float()
    Full(weights=weights).adapt(model)
    after = outputs_of(model, row_features(model, batch, head)).float()
    assert torch.allclose(before, after, atol=0.05)
    trained = {name: p for name, p in trainable_parameters(model).items() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    after.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    settle(model)
    with torch.no_grad():
        assert torch.equal(before, outputs_of(model, row_features(model, batch, head)).float())
    assert not any(module._forward_hooks_always_called for module in model.modules())
