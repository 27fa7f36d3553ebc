"""GRPO, RLOO and PPO: losses and gradients beside TRL's, advantages by hand, and that splitting changes nothing."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

from policy_rows import LENGTHS, rollout_of, rows_of
from steps import assert_same, gradients, split
from tiny import shake, tiny
from tunesmith.batch import Example, pack
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.models.value_head import add_value_head, take_value_head, values_at
from tunesmith.objectives import Grpo, Ppo, Rloo
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.policy import ADVANTAGES, OLD
from tunesmith.objectives.ppo import (
    RETURNS,
    VALUES,
    estimated_advantages,
    logps_and_values,
    value_losses,
    whitened,
)
from tunesmith.objectives.preference import REFERENCE

REWARDS = [1.0, 0.0, 0.25, 0.5, 0.5, 2.0]
EXACT: Any = {"kind": "exact"}
OBJECTIVES: dict[str, Any] = {
    "grpo": Grpo(reward=EXACT, group_size=3, kl=0.2, max_new_tokens=7),
    "grpo-answer": Grpo(reward=EXACT, group_size=3, kl=0.2, max_new_tokens=7, average="answer", clip_high=0.3),
    "grpo-budget": Grpo(reward=EXACT, group_size=3, kl=0.0, max_new_tokens=7, average="budget", scale="none"),
    "rloo": Rloo(reward=EXACT, group_size=3, kl=0.3, max_new_tokens=7),
    "ppo": Ppo(reward=EXACT, group_size=3, kl=0.1, max_new_tokens=7),
}
METHODS: dict[str, Any] = {"full": Full(), "lora": Lora(rank=4)}


def policy(method: str, *, values: bool = False) -> Any:
    model = tiny()
    METHODS[method].adapt(model)
    shake(model)
    if values:
        head = add_value_head(model)
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(5))
    return model


def rows_for(name: str, model: Any, moved: float = 0.15) -> list[Example]:
    """Rows whose answers were drawn by a policy a little away from the model, so that some ratios are clipped."""
    objective = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(9)
    tokens = sum(map(sum, LENGTHS))
    values = torch.randn(tokens, generator=generator) if objective.has_values else None
    rollout = rollout_of(REWARDS, kl=objective.kl_weight, values=values)
    rows = rows_of(objective, rollout, rollout.logps)
    with torch.no_grad():
        now = token_logps(model, pack(rows)).logps
    old = now + moved * torch.randn(tokens, generator=generator)
    reference = now + 0.3 * torch.randn(tokens, generator=generator)
    start = 0
    for row in rows:
        end = start + row.targets
        row.tensors[OLD], row.tensors[REFERENCE] = old[start:end], reference[start:end]
        start = end
    return rows


def in_trl(rows: list[Example]) -> dict[str, Tensor]:
    """The same answers as TRL lays them out: a row each, prompts padded on the left, completions on the right."""
    prompts, completions, named = [], [], defaultdict(list)
    for row in rows:
        first, *answers = row.own_segments().tolist()
        done = 0
        for start, length, _ in answers:
            prompts.append(row.token_ids[: first[1]].flip(0))
            completions.append(row.token_ids[start : start + length])
            for name in (OLD, REFERENCE, ADVANTAGES):
                if name in row.tensors:
                    named[name].append(row.tensors[name][done : done + length])
            done += length
    masks = pad_sequence([torch.ones_like(ids) for ids in completions], batch_first=True)
    return {
        "prompt_ids": pad_sequence(prompts, batch_first=True).flip(1),
        "prompt_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True).flip(1),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": masks,
        "old_per_token_logps": pad_sequence(named[OLD], batch_first=True),
        "ref_per_token_logps": pad_sequence(named[REFERENCE], batch_first=True),
        "old_logps": torch.stack([part.sum() for part in named[OLD]]),
        "advantages": torch.stack([part[0] for part in named[ADVANTAGES]]),
        "num_items_in_batch": masks.sum(),
    }


def trl_trainer(objective: Any) -> Any:
    """What TRL's own loss reads of its trainer."""
    names = {"token": "dapo", "answer": "grpo", "budget": "dr_grpo"}

    def logps(model: Any, ids: Tensor, mask: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor, None]:
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        shares = logits[:, -keep - 1 : -1].log_softmax(-1)
        return shares.gather(2, ids[:, -keep:, None])[..., 0], torch.zeros(len(ids), keep), None

    same = lambda values, **_: values  # noqa: E731
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=logps,
        beta=objective.kl,
        epsilon_low=objective.clip,
        epsilon_high=getattr(objective, "clip_high", None) or objective.clip,
        loss_type=names[getattr(objective, "average", "token")],
        max_completion_length=objective.max_new_tokens,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )


@pytest.mark.parametrize("name", ["grpo", "grpo-answer", "grpo-budget", "rloo"])
def test_loss_and_gradient_are_those_of_trl(name: str) -> None:
    objective, model = OBJECTIVES[name], policy("lora")
    rows = rows_for(name, model)
    found, result = gradients(model, objective, [pack(rows)])
    model.zero_grad()
    model.set_attn_implementation("eager")
    trainer: Any = RLOOTrainer if name == "rloo" else GRPOTrainer
    expected = trainer._compute_loss(trl_trainer(objective), model, in_trl(rows))
    expected.backward()
    assert result.loss == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    theirs = {key: parameter.grad for key, parameter in trainable_parameters(model).items()}
    assert_same(found, {key: grad for key, grad in theirs.items() if grad is not None}, 2e-4)


def test_ratios_of_this_test_are_clipped_on_both_sides() -> None:
    model = policy("lora")
    batch = pack(rows_for("grpo", model))
    ratio = (token_logps(model, batch).logps.detach() - batch.tensors[OLD]).exp()
    assert float(ratio.max()) > 1.2 and float(ratio.min()) < 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_splitting_and_padding_change_no_gradient(name: str, method: str) -> None:
    model = policy(method, values=OBJECTIVES[name].has_values)
    rows = rows_for(name, model)
    whole, result = gradients(model, OBJECTIVES[name], [pack(rows)])
    for layout in ("packed", "padded"):
        parts, again = gradients(model, OBJECTIVES[name], split(rows, [[1], [0]], layout))
        assert again.loss == pytest.approx(result.loss, rel=1e-4, abs=1e-5)
        assert_same(parts, whole, 3e-4)


def test_advantages_of_grpo() -> None:
    """As TRL's `_generate_and_score_completions` computes them."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    mean = rewards.view(-1, 3).mean(1).repeat_interleave(3)
    std = nanstd(rewards.view(-1, 3), dim=1).repeat_interleave(3)
    for name, expected in (("grpo", (rewards - mean) / (std + 1e-4)), ("grpo-budget", rewards - mean)):
        rollout = rollout_of(REWARDS)
        found = OBJECTIVES[name].signals(rollout)[ADVANTAGES]
        torch.testing.assert_close(found, expected.float()[rollout.answer_of_token()])


def test_a_group_that_is_worth_the_same_teaches_nothing() -> None:
    found = OBJECTIVES["grpo"].signals(rollout_of([0.7] * 3 + REWARDS[3:]))[ADVANTAGES]
    assert not bool(found[: sum(LENGTHS[0])].any()) and bool(found[sum(LENGTHS[0]) :].any())


def test_advantages_of_rloo_leave_an_answer_itself_out() -> None:
    rollout = rollout_of(REWARDS, kl=0.5)
    sums = rollout.summed(rollout.distances()).tolist()
    worth = [reward - 0.5 * apart for reward, apart in zip(REWARDS, sums, strict=True)]
    found = OBJECTIVES["rloo"].signals(rollout)[ADVANTAGES]
    firsts = [0, *rollout.lengths.cumsum(0).tolist()[:-1]]
    assert found[firsts[0]] == pytest.approx(worth[0] - (worth[1] + worth[2]) / 2)
    assert found[firsts[4]] == pytest.approx(worth[4] - (worth[3] + worth[5]) / 2)


def test_generalized_advantages_by_hand() -> None:
    """Two answers; gamma 0.9, lambda 0.5: d_t = r_t + 0.9 V_{t+1} - V_t, A_t = d_t + 0.45 A_{t+1}."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.5, 0.2, 0.4, -1.0])
    found = estimated_advantages(rewards, values, torch.tensor([3, 1]), 0.9, 0.5)
    last = 1.0 - 0.4
    middle = 0.9 * 0.4 - 0.2 + 0.45 * last
    first = 0.9 * 0.2 - 0.5 + 0.45 * middle
    torch.testing.assert_close(found, torch.tensor([first, middle, last, 3.0]))


def test_lambda_one_is_what_came_less_what_was_expected() -> None:
    """Schulman et al. 2016, equation 18: with lambda 1 the values in between cancel."""
    rewards, values = torch.randn(6), torch.randn(6)
    found = estimated_advantages(rewards, values, torch.tensor([6]), 1.0, 1.0)
    came = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found, came - values, rtol=1e-5, atol=1e-5)


def test_signals_of_ppo() -> None:
    """The penalty on every token, the reward at the last of each answer; returns before whitening."""
    tokens = sum(map(sum, LENGTHS))
    values = torch.linspace(-1, 1, tokens)
    rollout = rollout_of(REWARDS, kl=0.3, values=values)
    found = OBJECTIVES["ppo"].signals(rollout)
    rewards = -0.3 * rollout.distances()
    for end, reward in zip(rollout.lengths.cumsum(0).tolist(), REWARDS, strict=True):
        rewards[end - 1] += reward
    advantages = estimated_advantages(rewards, values, rollout.lengths, 1.0, 0.95)
    torch.testing.assert_close(found[RETURNS], advantages + values)
    torch.testing.assert_close(found[ADVANTAGES], whitened(advantages))
    assert float(found[ADVANTAGES].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[ADVANTAGES].std()) == pytest.approx(1, abs=1e-3)
    scaled = OBJECTIVES["ppo"].model_copy(update={"whiten_rewards": True}).signals(rollout)
    other = estimated_advantages(whitened(rewards, keeps_mean=True), values, rollout.lengths, 1.0, 0.95)
    torch.testing.assert_close(scaled[RETURNS], other + values)


def test_losses_of_ppo_by_hand() -> None:
    """Mean over tokens of max(-A r, -A clip(r)) and of half the larger squared error (Stiennon et al. 2020's code)."""
    model = policy("lora", values=True)
    rows = rows_for("ppo", model)
    batch = pack(rows)
    with torch.no_grad():
        logps, values = logps_and_values(model, batch)
    losses, others = [], []
    for at in range(len(logps)):
        ratio = float((logps[at] - batch.tensors[OLD][at]).exp())
        advantage, old, goal = (float(batch.tensors[name][at]) for name in (ADVANTAGES, VALUES, RETURNS))
        losses.append(max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)))
        near = min(max(float(values[at]), old - 0.2), old + 0.2)
        others.append(0.5 * max((float(values[at]) - goal) ** 2, (near - goal) ** 2))
    _, result = gradients(model, OBJECTIVES["ppo"], [batch])
    assert result.loss == pytest.approx(sum(losses) / len(losses) + 0.1 * sum(others) / len(others), rel=1e-5)


def test_values_that_moved_too_far_the_right_way_gain_nothing() -> None:
    values = torch.tensor([0.5, 0.1], requires_grad=True)
    value_losses(values, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), 0.2).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, -0.9])


def test_the_value_head_reads_what_stands_before_a_token() -> None:
    model = policy("lora", values=True)
    [row, _] = rows_for("ppo", model)
    _, values = logps_and_values(model, pack([row]))
    prompt, answer = row.own_segments()[0, 1], row.own_segments()[2]
    ids = torch.cat([row.token_ids[:prompt], row.token_ids[answer[0] : answer[0] + answer[1]]])
    model.set_attn_implementation("eager")
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    before = values_at(model, hidden[prompt - 1 : -1])
    first = int(row.own_segments()[1, 1])
    torch.testing.assert_close(values[first : first + int(answer[1])], before, rtol=1e-4, atol=1e-4)
    assert take_value_head(model) is not None and take_value_head(model) is None
    with pytest.raises(ValueError, match="no value head"):
        values_at(model, hidden)


def test_the_controller_steers_the_distance() -> None:
    objective = OBJECTIVES["ppo"].model_copy(update={"kl_target": 4.0})
    assert objective.next_kl_weight(0.1, 8.0) == pytest.approx(0.1 * 1.02)
    assert objective.next_kl_weight(0.1, 4.4) == pytest.approx(0.1 * 1.01)
    assert objective.next_kl_weight(0.1, 0.0) == pytest.approx(0.1 * 0.98)
    assert OBJECTIVES["ppo"].next_kl_weight(0.1, 8.0) == 0.1
