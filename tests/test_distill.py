"""Distillation as a loss: what is compared, its gradient, and TRL's on the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from steps import assert_same, gradients, split
from tiny import VOCABULARY, random_rows, reference_logits, shake, tiny
from tunesmith.batch import Batch, Example, pack
from tunesmith.methods import Adapter, Full, HeadOnly, Ia3, Lora, Prefix, Prompt
from tunesmith.models import outcomes
from tunesmith.models.forward import hidden_at, likeliest_next, next_token_outcomes
from tunesmith.objectives.distill import TEACHER_LOGPS, TEACHER_TOKENS, WRITTEN, Distill
from tunesmith.train.precision import Precision

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (9, 4, 14, 6, 3)
WEIGHTS = (0.5, 1.0)
LOSSES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse-kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "mixed": {"weight": 0.7, "temperature": 2.0, "top_k": 5},
    "few": {"top_k": 3, "divergence": "reverse-kl"},
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def distill(**settings: Any) -> Distill:
    return Distill.model_validate({"teacher": "teacher", "top_k": VOCABULARY, **settings})


def taught(objective: Distill, rows: Sequence[Example], teacher: nn.Module) -> list[Example]:
    """Rows with what the teacher says of their targets."""
    found = []
    for row in rows:
        batch = pack([row])
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        tokens, logps = likeliest_next(teacher, batch, chosen - 1, objective.top_k, objective.temperature, VOCABULARY)
        more = {TEACHER_TOKENS: tokens, TEACHER_LOGPS: logps}
        scopes: Any = {**row.scopes, **dict.fromkeys(more, "target")}
        found.append(replace(row, tensors={**row.tensors, **more}, scopes=scopes))
    return found


def student(method: Any = None, **overrides: Any) -> nn.Module:
    model = tiny(seed=1, **overrides)
    (method or Full()).adapt(model)
    return shake(model)


def rows_and_teacher() -> tuple[list[Example], nn.Module]:
    return random_rows(LENGTHS, weights=WEIGHTS), tiny(seed=2, num_hidden_layers=1)


def expected_loss(objective: Distill, model: nn.Module, teacher: nn.Module, rows: Sequence[Example]) -> Tensor:
    """The same by the whole vocabulary at once, the rest made by hand."""
    total, divisor = torch.zeros(()), sum(float(row.tensors["target_weights"].sum()) for row in rows)
    for row in rows:
        for at in torch.nonzero(row.tensors["target_weights"]).squeeze(1).tolist():
            ids = row.token_ids[None]
            theirs = torch.softmax(teacher(input_ids=ids).logits[0, at - 1].detach() / objective.temperature, -1)
            logits: Tensor = model(input_ids=ids).logits[0, at - 1]
            ours = torch.softmax(logits / objective.temperature, -1)
            if objective.top_k < VOCABULARY:
                kept = theirs.topk(objective.top_k).indices
                theirs, ours = (torch.cat([p[kept], 1 - p[kept].sum(-1, keepdim=True)]) for p in (theirs, ours))
            p, q = theirs, ours
            if objective.divergence == "jsd":
                beta = objective.beta or 0.5
                m = beta * p + (1 - beta) * q
                found = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
            else:
                p, q = (p, q) if objective.divergence == "forward-kl" else (q, p)
                found = (p * (p / q).log()).sum()
            nll = F.cross_entropy(logits[None], row.token_ids[at : at + 1])
            loss = objective.weight * objective.temperature**2 * found + (1 - objective.weight) * nll
            total = total + row.tensors["target_weights"][at] * loss / divisor
    return total


@every_loss
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(name: str, method: Any) -> None:
    objective, (rows, teacher) = distill(**LOSSES[name]), rows_and_teacher()
    model = student(method)
    found, result = gradients(model, objective, split(taught(objective, rows, teacher), [[0, 2], [1, 3, 4]], "packed"))
    for each in (model, teacher):
        each.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        each.zero_grad(set_to_none=True)
    loss = expected_loss(objective, model, teacher, rows)
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    trained = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert_same(found, trained, tolerance=2e-4)  # pyright: ignore[reportArgumentType]


@every_loss
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_how_rows_are_split_and_laid_out_changes_nothing(name: str, layout: Any) -> None:
    objective, (rows, teacher) = distill(**LOSSES[name]), rows_and_teacher()
    rows, model = taught(objective, rows, teacher), student()
    whole, result = gradients(model, objective, split(rows, [[0, 1, 2, 3, 4]], "packed"))
    for parts in ([[0], [1], [2], [3], [4]], [[4, 3, 2], [1, 0]]):
        found, again = gradients(model, objective, split(rows, parts, layout))
        assert_same(found, whole, tolerance=1e-4)
        assert again.loss == pytest.approx(result.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("beta", "settings"),
    [
        (0.0, {}),
        (1.0, {"divergence": "reverse-kl"}),
        (0.5, {"divergence": "jsd"}),
        (0.2, {"divergence": "jsd", "beta": 0.2, "temperature": 2.0}),
    ],
)
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_loss_and_gradient_equal_trl(beta: float, settings: dict[str, Any], method: Any) -> None:
    """TRL leaves out the square of the temperature that Hinton et al. put before the divergence."""
    from trl.experimental.gkd import GKDTrainer

    objective, rows = distill(**settings), random_rows(LENGTHS)
    teacher, model = tiny(seed=2, num_hidden_layers=1), student(method)
    found, result = gradients(model, objective, split(taught(objective, rows, teacher), [[0, 2], [1, 3, 4]], "packed"))
    model.zero_grad(set_to_none=True)
    pairs = []
    for each in (model, teacher):
        each.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        pairs.append(torch.cat([each(input_ids=row.token_ids[None]).logits[0, :-1] for row in rows]))
    trained = torch.cat([row.tensors["target_weights"][1:] for row in rows]) > 0
    labels = torch.cat([row.token_ids[1:] for row in rows]).masked_fill(~trained, -100)
    theirs = GKDTrainer.generalized_jsd_loss(
        pairs[0][None], pairs[1][None].detach(), labels[None], beta, objective.temperature
    )
    theirs = theirs * objective.temperature**2
    theirs.backward()
    assert result.loss == pytest.approx(theirs.item(), rel=1e-4)
    trained_gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert_same(found, trained_gradients, tolerance=2e-4)  # pyright: ignore[reportArgumentType]


def test_the_gradient_is_that_of_small_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.stack([torch.randperm(9)[:3] for _ in range(5)]), torch.tensor([0, 3, 8, 1, 1])

    def both(hidden: Tensor, weight: Tensor) -> Tensor:
        found = outcomes.outcomes_of(hidden, lambda rows: rows @ weight.T, tokens, targets, 1.7, 9)
        return torch.cat([found.logps, found.targets[:, None]], 1)

    # Wide steps: the function computes in fp32.
    assert torch.autograd.gradcheck(both, (hidden, weight), eps=1e-2, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_logits_in_pieces_are_logits_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits, so that they are the model's own."""
    model, row = tiny(kind), random_rows([20])[0]
    batch, places = pack([row], "padded"), torch.arange(19)
    logits = reference_logits(model, row.token_ids)[:-1]
    tokens = torch.stack([torch.randperm(VOCABULARY)[:7] for _ in places])
    monkeypatch.setattr(outcomes, "LOGITS_AT_ONCE", 4 * VOCABULARY)
    found = next_token_outcomes(model, batch, places, row.token_ids[1:], tokens, 2.0)
    cooled = (logits / 2).softmax(-1)
    chosen = cooled.gather(1, tokens)
    expected = torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], 1).log()
    assert torch.allclose(found.logps, expected, atol=1e-4)
    assert torch.allclose(found.targets, logits.log_softmax(-1).gather(1, row.token_ids[1:, None])[:, 0], atol=1e-4)
    best, logps = likeliest_next(model, batch, places, 5, 2.0, VOCABULARY)
    assert torch.equal(best.sort().values, cooled.topk(5).indices.sort().values)
    assert torch.allclose(logps.exp().sum(1), torch.ones(19), atol=1e-5)


def test_the_mass_of_the_rest_is_not_rounded_away() -> None:
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[30.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = outcomes.outcomes_of(hidden, lambda rows: rows @ weight.T, torch.tensor([[0]]), torch.tensor([0]), 1.0, 3)
    logits = (hidden.double() @ weight.double().T)[0]
    expected = torch.logsumexp(logits[1:], 0) - torch.logsumexp(logits, 0)
    assert found.logps[0, 1].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_teacher_with_another_table_of_the_same_tokens() -> None:
    """Tables are padded: what a teacher's has beyond the student's counts for nothing, and the other way round."""
    row = random_rows([12])[0]
    batch, places = pack([row]), torch.arange(11)
    larger, smaller = tiny(vocab_size=VOCABULARY + 32), tiny(vocab_size=VOCABULARY - 8)
    tokens, logps = likeliest_next(larger, batch, places, 999, 1.0, VOCABULARY)
    assert tokens.shape == (11, VOCABULARY) and int(tokens.max()) < VOCABULARY and logps.shape == tokens.shape
    low = replace(batch, token_ids=batch.token_ids % (VOCABULARY - 8))
    tokens, logps = likeliest_next(smaller, low, places, 999, 1.0, VOCABULARY)
    assert tokens.shape == (11, VOCABULARY - 9) and logps.shape == (11, VOCABULARY - 8)
    assert logps.isfinite().all()


def test_a_coarser_choice_never_diverges_more() -> None:
    objective, (rows, teacher) = distill(), rows_and_teacher()
    model, losses = student(), []
    for count in (1, 4, 16, VOCABULARY):
        objective = distill(top_k=count)
        losses.append(gradients(model, objective, [pack(taught(objective, rows, teacher))])[1].loss)
    assert losses == sorted(losses) and losses[0] > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    objective, (rows, _) = distill(top_k=8), rows_and_teacher()
    model = student()
    _, result = gradients(model, objective, [pack(taught(objective, rows, model))])
    assert abs(result.loss) < 1e-6 and result.grad_norm < 1e-4


def test_answers_of_its_own_have_no_cross_entropy() -> None:
    objective, (rows, teacher) = distill(weight=0.5), rows_and_teacher()
    rows, model = taught(objective, rows, teacher), student()
    nobody = [
        replace(
            row,
            tensors={**row.tensors, WRITTEN: torch.zeros(len(row))},
            scopes={**row.scopes, WRITTEN: "token"},
        )
        for row in rows
    ]
    found, result = gradients(model, objective, split(nobody, [[0, 1], [2, 3, 4]], "packed"))
    alone, expected = gradients(model, distill(), [pack(rows)])
    assert result.loss == pytest.approx(expected.loss / 2, rel=1e-4)
    assert_same(found, {name: tensor / 2 for name, tensor in alone.items()}, tolerance=1e-4)


def test_a_frozen_trunk_gives_the_head_what_it_would_read() -> None:
    objective, (rows, teacher) = distill(weight=0.5, top_k=4), rows_and_teacher()
    model = student(HeadOnly())
    rows = taught(objective, rows, teacher)
    expected, through = gradients(model, objective, [pack(rows)])

    def with_features(row: Example) -> Example:
        batch = pack([row])
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        with torch.no_grad():
            features = hidden_at(model, batch, chosen - 1)
        return replace(row, tensors={**row.tensors, "features": features}, scopes={**row.scopes, "features": "target"})

    found, result = gradients(model, objective, [pack([with_features(row) for row in rows])])
    assert result.loss == pytest.approx(through.loss, rel=1e-5)
    assert_same(found, expected, tolerance=1e-4)


@pytest.mark.parametrize(
    "method",
    [Prompt(tokens=3), Prefix(tokens=3, init="random"), Ia3(), Adapter(size=4)],
    ids=lambda method: method.kind,
)
def test_it_meets_other_methods(method: Any) -> None:
    objective, (rows, teacher) = distill(weight=0.5, top_k=8), rows_and_teacher()
    rows, model = taught(objective, rows, teacher), student(method)
    packed, result = gradients(model, objective, split(rows, [[0, 1, 2, 3, 4]], "packed"))
    padded, again = gradients(model, objective, split(rows, [[0, 1], [2, 3, 4]], "padded"))
    assert_same(padded, packed, tolerance=1e-3)
    assert again.loss == pytest.approx(result.loss, rel=1e-4)


def test_recomputing_blocks_changes_nothing() -> None:
    objective, (rows, teacher) = distill(weight=0.5, top_k=8), rows_and_teacher()
    rows, model = taught(objective, rows, teacher), student(Lora(rank=4))
    plain, _ = gradients(model, objective, [pack(rows)])
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
    recomputed, _ = gradients(model, objective, [pack(rows)])
    assert_same(recomputed, plain, tolerance=1e-4)


def test_bf16_is_near_fp32() -> None:
    objective, (rows, teacher) = distill(weight=0.5, top_k=8), rows_and_teacher()
    rows = taught(objective, rows, teacher)
    exact, wide = gradients(student(Lora(rank=4)), objective, [pack(rows)])
    model = student(Lora(rank=4), dtype=torch.bfloat16)
    _, narrow = gradients(model, objective, [pack(rows)], precision=Precision(torch.bfloat16, torch.device("cpu")))
    assert narrow.loss == pytest.approx(wide.loss, rel=0.05) and exact


def test_validation_measures_the_loss_that_is_trained() -> None:
    objective, (rows, teacher) = distill(weight=0.3, temperature=2.0, top_k=6), rows_and_teacher()
    batch: Batch = pack(taught(objective, rows, teacher))
    model = student()
    _, result = gradients(model, objective, [batch])
    with torch.no_grad():
        logps, chosen = objective.target_logps(model, batch)
    asked = batch.tensors["target_weights"]
    assert -(logps * asked[chosen]).sum() / asked.sum() == pytest.approx(result.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": None}, "there is no teacher"),
        ({"beta": 0.5}, "beta belongs to divergence jsd"),
        ({"weight": 0}, "the teacher has no say"),
        ({"weight": 0, "on_policy": 0.5}, "teach it nothing"),
        ({"weight": 0, "answers": "teacher", "temperature": 2}, "temperature changes nothing"),
        ({"weight": 0, "answers": "teacher", "top_k": 2}, "top_k changes nothing"),
        ({"sample_temperature": 1}, "sample_temperature is about answers"),
        ({"max_new_tokens": 9}, "max_new_tokens is about answers"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Distill.model_validate({"teacher": "teacher", **settings})
