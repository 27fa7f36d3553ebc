"""Tests of differences against scipy's, corrections by hand, and what they do to a verdict."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import compare_metrics, judgement
from tunesmith.metrics import holm, mean_rows, metric, paired_test
from tunesmith.metrics.significance import mcnemar_exact, paired_permutation
from tunesmith.recipe import EvaluateSpec

OFF = {"status": "off", "reason": ""}


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 5), (3, 3), (10, 2), (120, 71), (0, 1), (900, 1000)])
def test_mcnemar_is_scipys_binomial_test(one: int, other: int) -> None:
    expected = stats.binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert mcnemar_exact(one, other) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(one, other) == mcnemar_exact(other, one)


def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(x, axis=axis) - np.mean(y, axis=axis)


def test_the_permutation_test_is_scipys() -> None:
    rng = np.random.default_rng(3)
    base, tuned = rng.uniform(size=9), rng.uniform(size=9) + 0.2
    exact = stats.permutation_test(
        (tuned, base), mean_difference, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    found = paired_permutation(mean_rows(base), mean_rows(tuned), resamples=10, seed=0)
    assert found == pytest.approx(exact.pvalue)
    base, tuned = rng.uniform(size=60), rng.uniform(size=60) + 0.1
    drawn = stats.permutation_test(
        (tuned, base), mean_difference, permutation_type="samples", n_resamples=9999, vectorized=True
    )
    p = paired_permutation(mean_rows(base), mean_rows(tuned), resamples=9999, seed=0)
    assert p == pytest.approx(drawn.pvalue, abs=0.02) and p > 0


def test_the_permutation_test_takes_metrics_of_a_whole_corpus() -> None:
    references = [
        [f"the {word} cat sat on the mat today"] for word in "old new red big fat wet shy odd dry sad".split()
    ]
    right = [texts[0] for texts in references]
    wrong = ["a dog ran far away in the rain"] * 10
    base, tuned = (metric("bleu").rows(answers, references) for answers in (wrong, right))
    assert paired_test(base, tuned, resamples=200, seed=0) == (2 / 1024, "paired permutation")
    assert paired_test(base, base, resamples=200, seed=0)[0] == 1.0
    with pytest.raises(ValueError, match="the same rows"):
        paired_permutation(base, mean_rows([1.0]), resamples=10, seed=0)


def test_rows_that_are_right_or_wrong_are_tested_exactly() -> None:
    base, tuned = mean_rows([0, 0, 0, 0, 0, 1]), mean_rows([1, 1, 1, 1, 1, 1])
    assert paired_test(base, tuned, resamples=100, seed=0) == (2 / 32, "exact McNemar")
    assert paired_test(mean_rows([0.5, 0]), mean_rows([1, 0]), resamples=100, seed=0)[1] == "paired permutation"


def test_holm_by_hand() -> None:
    # the example of Holm's procedure with four tests: 4 * 0.005, 3 * 0.01, then no smaller than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def answered(answers: list[str]) -> list[Judged]:
    return [Judged(f"r:{at}", f"p{at}", ["right"], answer, "stop", 1.0, 2) for at, answer in enumerate(answers)]


def test_few_rows_prove_nothing_however_they_fall() -> None:
    spec = EvaluateSpec(resamples=200)
    for rows, shown, verdict in ((4, "no_difference", "no_difference"), (8, "better", "ship")):
        entries, _ = compare_metrics(
            ["exact_match"], answered(["wrong"] * rows), answered(["right"] * rows), spec, seed=0
        )
        assert entries[0]["low"] == 1.0, "the bootstrap alone would be sure"
        assert (entries[0]["shown"], judgement(entries, OFF, {}).verdict) == (shown, verdict)
    gate = judgement(
        compare_metrics(["f1"], answered(["no"] * 3), answered(["right"] * 3), spec, 0)[0], OFF, {"f1": 0.1}
    )
    assert gate.verdict == "dont_ship" and gate.gate[0]["reason"] == "the gain is not distinguishable from zero"


def test_metrics_beside_the_deciding_one_are_corrected() -> None:
    base, tuned = answered(["wrong"] * 40), answered(["right"] * 7 + ["wrong"] * 33)
    names = ["exact_match", "accuracy", "f1", "rougeL"]
    entries, _ = compare_metrics(names, base, tuned, EvaluateSpec(resamples=400), seed=0)
    p = [entry["p"] for entry in entries]
    assert entries[0]["p_corrected"] == p[0] == pytest.approx(2 / 128)
    assert [entry["p_corrected"] for entry in entries[1:]] == pytest.approx(holm(p[1:]))
    assert entries[0]["shown"] == "better"
    names = ["exact_match", "accuracy", "f1", "rougeL", "rouge1", "chrf", "bleu"]
    entries, _ = compare_metrics(names, base, answered(["right"] * 6 + ["wrong"] * 34), EvaluateSpec(), seed=0)
    accuracy = entries[1]
    assert accuracy["low"] > 0 and accuracy["p"] < 0.05 < accuracy["p_corrected"]
    assert accuracy["shown"] == "no_difference" and entries[0]["shown"] == "better"
