"""Preference objectives: loss and gradient equal TRL's on the same batches, and small cases by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from conftest import build_tokenizer, colour_rows
from steps import assert_same, gradients
from tiny import tiny
from tunesmith.batch import Example, answers_behind, pack
from tunesmith.methods import Full
from tunesmith.objectives import Dpo, Kto, Orpo, SimPo
from tunesmith.objectives.kto import DESIRABLE
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.preference import REFERENCE, Answers

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"] * (1 + at % 3)}],
            "chosen": [{"role": "assistant", "content": row["completion"]}],
            "rejected": [{"role": "assistant", "content": row["completion"].lower() + " red" * (1 + at % 4)}],
        }
        for at, row in enumerate(colour_rows(count))
    ]


def with_reference(example: Example, model: Any, scopes: dict[str, Any]) -> Example:
    with torch.no_grad():
        logps = token_logps(model, pack([example])).logps
    tensors = {**example.tensors, REFERENCE: logps}
    return Example(
        example.token_ids, tensors, {"target_weights": "token", REFERENCE: "target", **scopes}, None, example.segments
    )


def joined(better: tuple[Tensor, Tensor], worse: tuple[Tensor, Tensor], **more: Tensor) -> Example:
    """Two rows of ids and completion masks, which begin with the same prompt, as one."""
    prompt = int(better[1].float().argmax())
    assert better[0][:prompt].tolist() == worse[0][:prompt].tolist()
    ids = torch.cat([better[0], worse[0][prompt:]])
    weights = torch.cat([better[1], worse[1][prompt:]]).float()
    segments = answers_behind(prompt, len(better[0]), len(ids))
    return Example(ids, {"target_weights": weights, **more}, {"target_weights": "token"}, None, segments)


def cut(ids: Tensor, mask: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    there = attention.bool()
    return ids[there], mask[there]


VARIANTS: dict[str, tuple[Dpo, dict[str, Any]]] = {
    "sigmoid": (Dpo(), {"loss_type": ["sigmoid"]}),
    "ipo": (Dpo(variant="ipo"), {"loss_type": ["ipo"]}),
    "hinge": (Dpo(variant="hinge", beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
    "robust": (Dpo(variant="robust", label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
    # TRL's "sft" is the mean over the better answers' tokens.
    "with likelihood": (Dpo(nll_weight=0.5), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_dpo_step_equals_trl(name: str, layout: Any, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    objective, settings = VARIANTS[name]
    theirs, ours, reference = tiny(vocab_size=400), tiny(vocab_size=400), tiny(vocab_size=400, seed=5)
    config = DPOConfig(output_dir=str(tmp_path / "trl"), **{**SETTINGS, **settings})
    trainer = DPOTrainer(
        theirs,
        ref_model=tiny(vocab_size=400, seed=5),
        args=config,
        train_dataset=Dataset.from_list(rows(4)),
        processing_class=build_tokenizer(tmp_path / "tokenizer"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    examples = []
    for at in range(4):
        sides = [
            cut(batch["input_ids"][row], batch["completion_mask"][row], batch["attention_mask"][row])
            for row in (at, at + 4)
        ]
        examples.append(with_reference(joined(*sides), reference, {}))
    Full().adapt(ours)
    found, result = gradients(ours, objective, [pack(examples[:3], layout), pack(examples[3:], layout)])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_same(found, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}, 1e-4)


def test_a_kto_step_equals_trl(tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    theirs, ours, reference = tiny(vocab_size=400), tiny(vocab_size=400), tiny(vocab_size=400, seed=5)
    data = [
        {"prompt": row["prompt"], "completion": row["chosen" if at % 3 else "rejected"], "label": bool(at % 3)}
        for at, row in enumerate(rows(4))
    ]
    config = KTOConfig(
        output_dir=str(tmp_path / "trl"), desirable_weight=1.2, undesirable_weight=0.7, beta=0.2, **SETTINGS
    )
    trainer = KTOTrainer(
        theirs,
        ref_model=tiny(vocab_size=400, seed=5),
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=build_tokenizer(tmp_path / "tokenizer"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    examples = []
    for at in range(4):
        own = cut(batch["input_ids"][at], batch["completion_mask"][at], batch["attention_mask"][at])
        other = cut(batch["KL_input_ids"][at], batch["KL_completion_mask"][at], batch["KL_attention_mask"][at])
        good = torch.tensor([float(batch["label"][at])])
        examples.append(with_reference(joined(own, other, **{DESIRABLE: good}), reference, {DESIRABLE: "row"}))
    Full().adapt(ours)
    objective = Kto(desirable_weight=1.2, undesirable_weight=0.7, beta=0.2)
    found, result = gradients(ours, objective, [pack(examples[:1]), pack(examples[1:])])
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_same(found, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}, 1e-4)


@pytest.fixture
def answers() -> Answers:
    sums = -torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * 20 - 1
    return Answers(sums.requires_grad_(), torch.randint(3, 12, (5, 2), generator=torch.Generator().manual_seed(1)))


def same_as(found: Tensor, expected: Tensor, answers: Answers) -> None:
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(losses.sum(), answers.sums, retain_graph=True)[0] for losses in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_cpo_and_simpo_equal_trl(answers: Answers) -> None:
    from trl.experimental.cpo import CPOTrainer

    def theirs(logps: Tensor, **settings: Any) -> Tensor:
        stub = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device=torch.device("cpu")), **settings)
        return CPOTrainer.cpo_loss(stub, logps[:, 0], logps[:, 1])[0]  # type: ignore[arg-type]

    cpo = theirs(answers.sums, loss_type="sigmoid", beta=0.1, label_smoothing=0.1)
    same_as(Dpo(variant="cpo", label_smoothing=0.1).losses(answers, None), cpo, answers)
    simpo = theirs(answers.means, loss_type="simpo", beta=2.0, simpo_gamma=0.8, label_smoothing=0.0)
    same_as(SimPo(beta=2.0, gamma=0.8).losses(answers, None), simpo, answers)


def test_orpo_equals_trl_and_the_definition(answers: Answers) -> None:
    from trl.experimental.orpo import ORPOTrainer

    stub = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device=torch.device("cpu")))
    theirs = -ORPOTrainer.odds_ratio_loss(stub, answers.means[:, 0], answers.means[:, 1])[0]  # type: ignore[arg-type]
    same_as(Orpo().losses(answers, None), theirs, answers)
    better, worse = (math.exp(float(mean)) for mean in answers.means[0].detach())
    log_odds = math.log(better / (1 - better)) - math.log(worse / (1 - worse))
    assert float(Orpo(beta=1.0).losses(answers, None)[0]) == pytest.approx(math.log(1 + math.exp(-log_odds)), rel=1e-5)


def test_orpos_conversation_counts_every_token_but_the_first() -> None:
    """TRL's ORPO averages over prompt and answer of the better side."""
    model = tiny()
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for prompt, better, worse in ((5, 4, 3), (2, 6, 5)):
        ids = torch.randint(3, 90, (prompt + better + worse,), generator=generator)
        weights = torch.tensor([0.0] * prompt + [1.0] * (better + worse))
        segments = answers_behind(prompt, prompt + better, len(ids))
        pairs.append(Example(ids, {"target_weights": weights}, {"target_weights": "token"}, None, segments))
    logps = []
    for pair in pairs:
        assert pair.segments is not None
        whole = pair.token_ids[: int(pair.segments[2, 0])]
        logits = model(input_ids=whole[None]).logits[0]
        logps.append(torch.log_softmax(logits[:-1], -1).gather(1, whole[1:, None]))
    expected = -torch.cat(logps).mean()
    for layout in ("packed", "padded"):
        objective, batch = Orpo(likelihood="conversation"), pack(pairs, layout)  # type: ignore[arg-type]
        nll = objective.loss(model, batch)["nll"] / objective.weights(batch)["nll"]
        assert float(nll) == pytest.approx(float(expected), rel=1e-5)


def test_ipos_target_is_half_of_one_over_beta() -> None:
    """At equal lengths the loss vanishes where the mean margin is 1 / (2 beta) (Azar et al. 2024, equation 17)."""
    lengths = torch.full((1, 2), 4.0)
    found = Answers(torch.tensor([[-4.0, -24.0]]), lengths)
    reference = Answers(torch.tensor([[-10.0, -10.0]]), lengths)
    assert float(Dpo(variant="ipo", beta=0.1).losses(found, reference)) == pytest.approx(0.0, abs=1e-6)
    assert float(Dpo(variant="ipo", beta=0.2).losses(found, reference)) == pytest.approx((5 - 2.5) ** 2)
