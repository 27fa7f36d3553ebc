"""Runs that are dead although they go on are noticed; living ones are left alone."""

from __future__ import annotations

import math

import pytest
import torch

from tiny import VOCABULARY, shake
from trial import Trial, adapted, plan_of
from tunesmith.base import TrainingError
from tunesmith.methods import Full, Lora
from tunesmith.train.health import LEAST_NORM, NOT_APPLIED_IN_A_ROW, RECENT, Health, refuse_dead_weights

IGNORANCE = math.log(50_000)


def watched(losses: list[float], norms: list[float] | None = None, vocabulary: int = 50_000) -> Health:
    health = Health(vocabulary=vocabulary)
    for at, loss in enumerate(losses, start=1):
        if math.isfinite(loss):
            health.observe(at, loss, norms[at - 1] if norms else 1.0)
        else:
            health.skip(at)
    return health


@pytest.mark.parametrize(
    "losses",
    [
        [2.5, 2.4, 2.2, 2.6, 2.1, 2.0, 1.9, 2.0],
        [IGNORANCE + 0.1, *[IGNORANCE - 0.05 * at for at in range(20)]],
        [IGNORANCE] * 30,
        [0.2, 1.2, 0.9, 1.4, 1.1, 0.8, 1.3, 0.9, 1.2, 1.0],
        [1.0],
        [2.5, 2.9],
        [2.0, 2.1, 30.0, 2.0, 1.9, 1.9, 2.0],
        [0.01, 0.3, 0.2, 0.1, 0.4, 0.3],
    ],
    ids=["learning", "random init", "random init, slow", "easy first row", "one step", "two", "spike", "mastered"],
)
def test_living_runs_are_left_alone(losses: list[float]) -> None:
    watched(losses).conclude()


def test_a_random_model_that_learns_is_not_taken_for_a_collapsed_one() -> None:
    trial = Trial(plan_of(steps=12, learning_rate=1e-3), method=Full(), initializer_range=0.02)
    progress = trial.run()
    assert progress.health.first_loss == pytest.approx(math.log(VOCABULARY), rel=0.02)
    assert progress.health.recent[-1][0] < progress.health.opening[0]


def test_steps_that_could_not_be_applied_are_counted() -> None:
    health = watched([2.0, 2.0])
    for at in range(NOT_APPLIED_IN_A_ROW - 1):
        health.skip(3 + at)
    health.observe(20, 2.0, 1.0)
    assert (health.not_applied, health.skipped) == (0, NOT_APPLIED_IN_A_ROW - 1)
    health.conclude()
    for at in range(NOT_APPLIED_IN_A_ROW - 1):
        health.skip(30 + at)
    with pytest.raises(TrainingError, match="the last step's loss or gradient was not a finite number, or jumped"):
        health.conclude()
    with pytest.raises(TrainingError, match="or jumped, 8 times in a row"):
        health.skip(40)
    assert math.isfinite(sum(loss for loss, _ in health.recent))


def test_a_run_without_one_finite_step_is_dead() -> None:
    with pytest.raises(TrainingError, match="no step had a finite loss"):
        watched([math.nan, math.nan]).conclude()


@pytest.mark.parametrize(
    "losses",
    [
        [2.5, 9.0, 14.0, 15.0, 16.0],
        [2.5, 2.4, 2.3, 2.4, 2.3, 9.0, 11.0, 12.0, 11.0, 11.0],
        [1.0, 1.1, 0.9, 1.0, 1.0, 3.0, 3.1, 3.2, 3.0, 3.1],
        [2.5, *[IGNORANCE] * 6],
    ],
    ids=["at once", "later", "far above its start", "to ignorance"],
)
def test_divergence_is_noticed_while_it_goes_on(losses: list[float]) -> None:
    with pytest.raises(TrainingError, match="diverged") as caught:
        watched(losses)
    assert caught.value.exit_code == 1 and "learning_rate" in str(caught.value.fix)


def test_a_short_run_that_diverged_is_noticed_at_its_end() -> None:
    with pytest.raises(TrainingError, match=r"diverged.* at the end"):
        watched([2.5, 8.0, 12.0]).conclude()


def test_collapse_is_noticed() -> None:
    start = [8.0, 7.0, 6.5]
    with pytest.raises(TrainingError, match=r"collapsed: the loss stands at 10\.8"):
        watched([*start, *[IGNORANCE] * RECENT], [2.0, 2.0, 2.0, *[1e-4] * RECENT])
    # The same loss with a living gradient is a model that begins.
    watched([*start, *[IGNORANCE] * RECENT], [2.0, 2.0, 2.0, *[1.0] * RECENT])


@pytest.mark.parametrize("norm", [0.0, LEAST_NORM / 2])
def test_a_run_dead_from_its_first_step_is_noticed(norm: float) -> None:
    with pytest.raises(TrainingError, match="collapsed"):
        watched([IGNORANCE] * RECENT, [norm] * RECENT)


def test_dead_weights_are_refused() -> None:
    alive = {"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.zeros(2), "b.lora_B.weight": torch.ones(2)}
    refuse_dead_weights(alive, starting_at_zero=True)
    refuse_dead_weights({"weight": torch.zeros(2)}, starting_at_zero=False)
    with pytest.raises(TrainingError, match="still zero"):
        refuse_dead_weights({**alive, "b.lora_B.weight": torch.zeros(2)}, starting_at_zero=True)
    embedding = {"e.lora_embedding_A": torch.zeros(2), "e.lora_embedding_B": torch.ones(2)}
    with pytest.raises(TrainingError, match="still zero"):
        refuse_dead_weights(embedding, starting_at_zero=True)
    for value in (math.nan, math.inf):
        with pytest.raises(TrainingError, match=r"not finite \(first: b\.lora_B"):
            refuse_dead_weights({**alive, "b.lora_B.weight": torch.tensor([1.0, value])}, starting_at_zero=True)


@pytest.mark.parametrize("method", [Lora(rank=4), Lora(rank=4, targets=["embed_tokens"])], ids=["linear", "embedding"])
def test_an_adapter_that_was_never_trained_is_refused(method: Lora) -> None:
    model = adapted(method)
    with pytest.raises(TrainingError, match="still zero"):
        refuse_dead_weights(method.trained_tensors(model), starting_at_zero=True)
    refuse_dead_weights(method.trained_tensors(shake(model)), starting_at_zero=True)
