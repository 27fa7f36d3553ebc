"""Tokens that are added, and rows of the vocabulary that are trained by themselves; PEFT is the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import write_jsonl
from steps import assert_same, gradients
from tiny import random_rows, tiny
from tunesmith.base import InputError
from tunesmith.batch import pack
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.token_rows import token_rows
from tunesmith.models.embeddings import grow_vocabulary, teach_tokens
from tunesmith.models.forward import next_token_logits
from tunesmith.objectives import Supervised
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import load, load_speaker
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe import TrainSpec
from tunesmith.recipe_file import check_recipe
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = [5, 17, 40]
ROWS = random_rows((9, 17, 12, 30))
FAMILIES = [("llama", True), ("llama", False), ("gemma", True), ("gpt2", True), ("gemma3_text", True)]
every_family = pytest.mark.parametrize(("family", "tied"), FAMILIES)


def method(**settings: Any) -> Lora:
    return Lora(rank=4, **{"trainable_tokens": IDS, **settings})


def trained(family: str = "llama", tied: bool = True, steps: int = 3, **settings: Any) -> nn.Module:
    model = tiny(family, tie_word_embeddings=tied)
    torch.manual_seed(3)
    method(**settings).adapt(model)
    optimizer = build_optimizer(model.train(), TrainSpec(), 2e-2)
    for _ in range(steps):
        assert step(model, Supervised(), optimizer, [pack(ROWS)]).applied
    return model.eval()


def logits(model: nn.Module, layout: Any = "packed") -> Tensor:
    batch = pack(ROWS, layout)
    with torch.no_grad():
        return next_token_logits(model.eval(), batch, torch.arange(batch.tokens)).float()


def tables(model: nn.Module) -> list[Any]:
    return [cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()]


@every_family
def test_only_the_rows_of_those_tokens_change(family: str, tied: bool) -> None:
    base = tiny(family, tie_word_embeddings=tied)
    adapted = copy.deepcopy(base)
    method().adapt(adapted)
    torch.testing.assert_close(logits(adapted), logits(base), rtol=0, atol=1e-6)
    width = cast(Any, base).get_input_embeddings().weight.shape[1]
    added = sum(p.numel() for n, p in trainable_parameters(adapted).items() if n.endswith("rows"))
    assert added == len(IDS) * width * (1 if tied else 2)
    model = trained(family, tied)
    expected = tiny(family, tie_word_embeddings=tied).state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("base.weight") and name.replace(".base.", ".") in expected:
            assert torch.equal(tensor, expected[name.replace(".base.", ".")])
    assert merge_layers(model) > 2
    for now, before in zip(*(tables(some) for some in (model, tiny(family, tie_word_embeddings=tied))), strict=True):
        moved = (now.weight != before.weight).any(dim=1).nonzero().flatten().tolist()
        assert moved and set(moved) <= set(IDS)
    assert model.state_dict().keys() == expected.keys()


@every_family
@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["own", "through PEFT"])
def test_peft_reads_what_is_written_and_it_is_read_back(
    family: str, tied: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(family, tied, **settings)
    expected = logits(model)
    torch.testing.assert_close(logits(model, "padded"), expected, rtol=1e-4, atol=2e-4)
    method(**settings).save(model, tmp_path, base="base")
    theirs = PeftModel.from_pretrained(tiny(family, tie_word_embeddings=tied), str(tmp_path)).eval()
    with torch.no_grad():
        found = torch.cat([theirs(input_ids=row.token_ids[None]).logits[0] for row in ROWS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-4)
    again = tiny(family, tie_word_embeddings=tied)
    loaded = load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    loaded.save(again, tmp_path / "again", base="base")
    with without_adapter(model):
        torch.testing.assert_close(logits(model), logits(tiny(family, tie_word_embeddings=tied)), rtol=1e-4, atol=1e-4)
    assert merge_layers(model) > 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=5e-4)


@every_family
def test_gradients_are_those_of_peft(family: str, tied: bool, tmp_path: Path) -> None:
    model = trained(family, tied)
    method().save(model, tmp_path, base="base")
    found, _ = gradients(model.train(), Supervised(), [pack(ROWS)])
    theirs = PeftModel.from_pretrained(tiny(family, tie_word_embeddings=tied), str(tmp_path), is_trainable=True)
    total, weight = torch.zeros(()), 0.0
    for row in ROWS:
        weights = row.tensors["target_weights"][1:]
        logps = theirs(input_ids=row.token_ids[None]).logits[0, :-1].float().log_softmax(-1)
        total = total - (logps.gather(1, row.token_ids[1:, None]).squeeze(1) * weights).sum()
        weight += float(weights.sum())
    (total / weight).backward()
    named = {name: p.grad for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name}
    ours = {name: gradient for name, gradient in found.items() if name.endswith("rows")}
    assert len(named) == len(ours) == (1 if tied else 2)
    by_table = [
        {"head" if "lm_head" in name else "table": cast(Tensor, gradient) for name, gradient in some.items()}
        for some in (ours, named)
    ]
    assert_same(*by_table, tolerance=1e-4)


def test_answers_are_those_of_peft(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        model = trained(family, steps=6)
        method().save(model, tmp_path / family, base="base")
        theirs: Any = PeftModel.from_pretrained(tiny(family, tie_word_embeddings=True), str(tmp_path / family)).eval()
        prompts = [[5, 17, 3], [40, 41, 9, 12], [5]]
        answers = generate(model, prompts, Sampling(8), stop_ids={2}, batch_size=4, progress=lambda *_: None)
        for prompt, answer in zip(prompts, answers, strict=True):
            row = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
            expected = row[0, len(prompt) :].tolist()
            expected = expected[: expected.index(2)] if 2 in expected else expected
            assert answer.token_ids == expected


def test_it_trains_in_bf16() -> None:
    model = tiny(dtype=torch.bfloat16, initializer_range=0.06)
    method().adapt(model)
    optimizer = build_optimizer(model.train(), TrainSpec(), 2e-2)
    losses = [step(model, Supervised(), optimizer, [pack(ROWS)]).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {module.rows.dtype for module in token_rows(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_tokens": "added"}, "no tokens were added"),
        ({"trainable_tokens": []}, "no token in the list"),
        ({"trainable_tokens": [96]}, "96 is not a token"),
        ({"targets": ["q_proj", "embed_tokens"]}, "embed_tokens is trained by the method already"),
        ({"modules_to_save": ["lm_head"]}, "is trained by the method already"),
    ],
)
def test_what_cannot_be_is_one_clear_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        method(**settings).adapt(tiny())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_added_tokens_start_as_the_mean_and_leave_the_others_alone(family: str, tied: bool) -> None:
    base, model = (tiny(family, tie_word_embeddings=tied) for _ in range(2))
    before = logits(base)
    teach_tokens(model, {"<a>": 96, "<b>": 97})
    for ours, theirs in zip(
        *([m.get_input_embeddings(), m.get_output_embeddings()] for m in (model, base)), strict=True
    ):
        torch.testing.assert_close(ours.weight[:96], theirs.weight)
        torch.testing.assert_close(ours.weight[96:], theirs.weight.mean(dim=0).expand(2, -1))
    assert (cast(Any, model).get_output_embeddings().weight is cast(Any, model).get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(model)[:, :96], before, rtol=1e-4, atol=1e-4)
    method(trainable_tokens="added").adapt(model)
    assert token_rows(model) and all(module.ids == [96, 97] for module in token_rows(model).values())


def job(base: Path, output: Path, **sections: Any) -> Any:
    rows = [
        {"prompt": f"Say {word} {at}", "completion": f"<call>{word}</call>"} for at in range(20) for word in ("a", "b")
    ]
    values = {
        "model": {"path": str(base), "add_tokens": ["<call>", "</call>"]},
        "data": {"train": str(write_jsonl(output.parent / "rows.jsonl", rows)), "validation": 0.2, "test": 0.2},
        "method": {"kind": "lora", "rank": 2, "trainable_tokens": "added"},
        "train": {"steps": 30, "batch_size": 8, "learning_rate": 0.03, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 8, "resamples": 20, "rows": 4, "forgetting": "off"},
        "output": str(output),
    }
    return check_recipe({**values, **sections}, "test")


def test_a_run_adds_tokens_trains_them_and_gives_them_back(tiny_model: Path, tmp_path: Path) -> None:
    run = finetune(job(tiny_model, tmp_path / "run"))
    plan = run.read("plan.json")
    assert run.report is not None and run.report["verdict"]
    adapter = run.path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer.convert_tokens_to_ids(["<call>", "</call>"])
    assert tokenizer.encode("<call>a", add_special_tokens=False)[0] == ids[0] and ids[1] == len(tokenizer) - 1
    ours = load_speaker(str(run.path), dtype="fp32")
    assert "<call>" in ours.text(ours.answer([[{"role": "user", "content": "Say a 3"}]], Sampling(8))[0].token_ids)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with pytest.raises((RuntimeError, IndexError)):
        PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))(input_ids=torch.tensor([ids]))
    base.resize_token_embeddings(len(tokenizer))  # as the documentation says
    theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    text = torch.tensor([tokenizer.encode("Say a 3 <call>a</call>")])
    with torch.no_grad():
        expected = theirs(input_ids=text).logits[0]
        torch.testing.assert_close(ours.model.eval()(input_ids=text).logits[0], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            load(adapter, dtype="fp32")(input_ids=text).logits[0], expected, rtol=1e-3, atol=1e-4
        )
    trained = sum(p.numel() for p in trainable_parameters(load(adapter)).values())
    assert plan["parameters"]["trainable"] == trained


def test_embeddings_that_are_trained_whole_take_added_tokens_too(tiny_model: Path, tmp_path: Path) -> None:
    for name, kind in (
        ("full", {"kind": "full"}),
        ("saved", {"kind": "lora", "targets": "qv", "modules_to_save": ["embed_tokens", "lm_head"]}),
    ):
        recipe = job(tiny_model, tmp_path / name, method=kind, evaluate="off", train={"steps": 2, "dtype": "fp32"})
        speaker = load_speaker(str(finetune(recipe).path))
        assert len(speaker.tokenizer) == len(cast(Any, speaker.model).get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"method": {"kind": "lora"}}, "does not train the embeddings of 2 added tokens"),
        ({"method": {"kind": "lora", "trainable_tokens": ["<call>"]}}, "embeddings of 1 added tokens"),
        ({"method": {"kind": "lora", "targets": ["embed_tokens"]}}, "embeddings of 2 added tokens"),
        ({"method": {"kind": "prompt"}}, "embeddings of 2 added tokens"),
        ({"method": {"kind": "lora", "trainable_tokens": ["<call>", "nowhere at all"]}}, "'nowhere at all' is not a"),
    ],
)
def test_added_tokens_that_nothing_trains_are_refused(
    sections: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        plan_job(job(tiny_model, tmp_path / "run", **sections))


def test_tokens_that_are_there_are_not_added(tiny_model: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny_model), "add_tokens": ["<|im_end|>"]}
    with pytest.raises(InputError, match="is a token of this model already"):
        plan_job(job(tiny_model, tmp_path / "run", model=model))


def test_an_adapter_with_whole_embeddings_of_a_larger_vocabulary_grows_the_base(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    grow_vocabulary(model, 99)
    Lora(rank=2, modules_to_save=["embed_tokens"]).adapt(model)
    Lora(rank=2, modules_to_save=["embed_tokens"]).save(model, tmp_path, base="base")
    again = tiny(tie_word_embeddings=True)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


def test_control_tokens_can_be_named_by_their_text(tiny_model: Path) -> None:
    model = load(tiny_model, dtype="fp32")
    Lora(rank=2, trainable_tokens=["<|im_start|>", 7]).adapt(model)
    assert {tuple(module.ids) for module in token_rows(model).values()} == {(1, 7)}
