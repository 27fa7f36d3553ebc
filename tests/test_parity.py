"""Loss and gradient equal those of TRL's trainer, and of PEFT with transformers' own loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import build_tokenizer, colour_rows
from steps import assert_same, gradients, split
from tiny import random_rows, shake, tiny
from tunesmith.batch import Example
from tunesmith.methods import Full, Lora
from tunesmith.objectives import Supervised

pytestmark = pytest.mark.filterwarnings("ignore")


def trl_trainer(directory: Path, model: nn.Module, peft_config: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer(directory / "tokenizer")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"] * (1 + at % 3)}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for at, row in enumerate(colour_rows(5))
    ]
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        completion_only_loss=True,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config
    )


def trl_gradients(trainer: Any) -> float:
    """One optimizer step's worth of TRL's own training steps; returns the loss."""
    # As `train` would: TRL divides by the targets of the window only when it knows that the model's loss allows it.
    micro_batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return sum(float(trainer.training_step(trainer.model, batch, count)) for batch in micro_batches)


def trl_rows(trainer: Any) -> list[Example]:
    """The tokens that TRL made of the rows, as ours."""
    return [
        Example(torch.tensor(row["input_ids"]), {"target_weights": (torch.tensor(row["labels"]) != -100).float()})
        for row in trainer.train_dataset
    ]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_full_step_equals_trl(layout: Any, tmp_path: Path) -> None:
    theirs, ours = tiny(vocab_size=400), tiny(vocab_size=400)
    trainer = trl_trainer(tmp_path, theirs, None)
    loss = trl_gradients(trainer)
    Full().adapt(ours)
    found, result = gradients(ours, Supervised(), split(trl_rows(trainer), [[4], [0, 2], [1, 3]], layout))
    expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert_same(found, expected)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert 0 < result.targets < result.tokens


def test_lora_step_equals_trl(tmp_path: Path) -> None:
    method, ours = Lora(rank=4, alpha=8), tiny(vocab_size=400)
    method.adapt(ours)
    shake(ours)
    trainer = trl_trainer(
        tmp_path,
        tiny(vocab_size=400),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    twins = dict(trainer.model.named_parameters())
    names = {name: name.removesuffix("weight") + "default.weight" for name in method.trained_tensors(ours)}
    with torch.no_grad():
        for name, tensor in method.trained_tensors(ours).items():
            twins[names[name]].copy_(tensor)
    loss = trl_gradients(trainer)
    _, result = gradients(ours, Supervised(), split(trl_rows(trainer), [[0, 1, 2, 3], [4]], "packed"))
    found = {name: tensor.grad for name, tensor in method.trained_tensors(ours).items()}
    assert_same(found, {name: twins[names[name]].grad for name in names})  # pyright: ignore[reportArgumentType]
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_lora_step_equals_peft_and_transformers() -> None:
    rows = random_rows([9, 4, 14])
    method, ours = Lora(rank=4, alpha=8), tiny()
    method.adapt(ours)
    shake(ours)
    theirs: Any = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    twins = dict(theirs.named_parameters())
    names = {name: name.removesuffix("weight") + "default.weight" for name in method.trained_tensors(ours)}
    with torch.no_grad():
        for name, tensor in method.trained_tensors(ours).items():
            twins[names[name]].copy_(tensor)
    token_ids = nn.utils.rnn.pad_sequence([row.token_ids for row in rows], batch_first=True)
    trained = nn.utils.rnn.pad_sequence([row.tensors["target_weights"] for row in rows], batch_first=True)
    mask = torch.arange(14)[None] < torch.tensor([9, 4, 14])[:, None]
    loss = theirs(input_ids=token_ids, attention_mask=mask, labels=token_ids.masked_fill(trained == 0, -100)).loss
    loss.backward()
    _, result = gradients(ours, Supervised(), split(rows, [[0, 2], [1]], "packed"))
    found = {name: tensor.grad for name, tensor in method.trained_tensors(ours).items()}
    assert_same(found, {name: twins[names[name]].grad for name in names})  # pyright: ignore[reportArgumentType]
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
