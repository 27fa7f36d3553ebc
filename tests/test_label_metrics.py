"""Metrics of labels and numbers, held against scikit-learn, seqeval and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score

from tunesmith.base import InputError
from tunesmith.metrics import BETWEEN, METRICS, paired_bootstrap

RANDOM = np.random.default_rng(0)
LABELS = ["card", "pin", "top up", "rare"]


def drawn(n: int) -> tuple[list[str], list[str]]:
    given, right = (RANDOM.choice(LABELS, n, p=[0.5, 0.3, 0.15, 0.05]).tolist() for _ in range(2))
    return given, right


def value(name: str, predictions: list[str], references: list[str]) -> float:
    return METRICS[name].rows(predictions, [[text] for text in references]).corpus()


@pytest.mark.parametrize("n", [1, 5, 200])
def test_f1_is_that_of_scikit_learn(n: int) -> None:
    given, right = drawn(n)
    assert value("macro_f1", given, right) == pytest.approx(f1_score(right, given, average="macro"))
    assert value("micro_f1", given, right) == pytest.approx(f1_score(right, given, average="micro"))


def test_rows_with_several_labels_or_none() -> None:
    rows = [(["a", "b"], ["a"]), ([], []), (["c"], ["b", "c"]), ([], ["a"])]
    given, right = ([BETWEEN.join(side) for side in sides] for sides in zip(*rows, strict=True))
    table = [[[float(label in row[side]) for label in "abc"] for row in rows] for side in (0, 1)]
    for average in ("macro", "micro"):
        expected = f1_score(np.array(table[1]), np.array(table[0]), average=average)
        assert value(f"{average}_f1", given, right) == pytest.approx(expected)


def test_entities_are_those_of_seqeval() -> None:
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    for _ in range(20):
        given, right = ([RANDOM.choice(tags, 7).tolist() for _ in range(6)] for _ in range(2))
        found = value("entity_f1", [" ".join(row) for row in given], [" ".join(row) for row in right])
        assert found == pytest.approx(entity_f1(right, given))
        words = np.mean(
            [a == b for one, other in zip(given, right, strict=True) for a, b in zip(one, other, strict=True)]
        )
        spelled = [" ".join(row) for row in given], [" ".join(row) for row in right]
        assert value("word_accuracy", *spelled) == pytest.approx(words)


def test_numbers_are_those_of_numpy() -> None:
    x, y = RANDOM.normal(size=50) * 1e3 + 1e6, RANDOM.normal(size=50)
    y += x / 1e3
    spelled = [repr(float(v)) for v in x], [repr(float(v)) for v in y]
    assert value("mae", *spelled) == pytest.approx(np.abs(x - y).mean())
    assert value("rmse", *spelled) == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    assert value("pearson", *spelled) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert value("pearson", ["1.0"] * 50, spelled[1]) == 0.0


def test_text_is_no_number() -> None:
    with pytest.raises(InputError, match="'many' is none"):
        value("rmse", ["many"], ["3"])


@pytest.mark.parametrize("name", ["macro_f1", "micro_f1"])
def test_intervals_of_label_metrics_hold_their_value(name: str) -> None:
    given, right = drawn(80)
    better = [r if RANDOM.random() < 0.6 else g for g, r in zip(given, right, strict=True)]
    rows = [METRICS[name].rows(texts, [[r] for r in right]) for texts in (given, better)]
    found = paired_bootstrap(*rows, resamples=200, confidence=0.95, seed=0)
    assert found.low is not None and found.high is not None
    assert found.low <= found.difference <= found.high and found.low > 0
