"""Shares, their intervals and agreement, beside other people's implementations and published examples."""

from __future__ import annotations

import random
from math import nan

import krippendorff
import pytest
from scipy.stats import binomtest

from tunesmith.metrics.agreement import krippendorff_alpha, share_agreeing
from tunesmith.metrics.proportions import difference_of_shares, wilson

# Krippendorff 2011, section C: four observers, twelve units, values missing; alpha is 0.743 there.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def units_of(raters: list[list[int | None]]) -> list[list[int]]:
    return [[value for value in values if value is not None] for values in zip(*raters, strict=True)]


def test_alpha_is_that_of_the_published_example() -> None:
    assert krippendorff_alpha(units_of(PUBLISHED)) == pytest.approx(0.743, abs=5e-4)


@pytest.mark.parametrize("seed", range(8))
def test_alpha_equals_the_krippendorff_package(seed: int) -> None:
    drawn = random.Random(seed)
    raters: list[list[int | None]] = [
        [drawn.choice([0, 1, 1, 2, None]) for _ in range(15)] for _ in range(2 + seed % 3)
    ]
    table = [[nan if value is None else value for value in row] for row in raters]
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    assert krippendorff_alpha(units_of(raters)) == pytest.approx(expected)


def test_nothing_can_be_said_of_agreement_without_two_values_or_two_kinds_of_them() -> None:
    assert krippendorff_alpha([]) is None and krippendorff_alpha([["a"], ["b"]]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0
    assert share_agreeing([["a"], []]) is None
    assert share_agreeing([["a", "a"], ["a", "b"], ["c"]]) == 0.5


@pytest.mark.parametrize(("count", "n"), [(0, 12), (7, 12), (12, 12), (1, 200)])
def test_intervals_of_shares_equal_scipys(count: int, n: int) -> None:
    expected = binomtest(count, n).proportion_ci(0.9, "wilson")
    assert wilson(count, n, 0.9) == pytest.approx((expected.low, expected.high))


def test_intervals_of_differences_are_those_published() -> None:
    """Newcombe 1998, table II, method 10, examples (a) and (c)."""
    assert difference_of_shares((56, 70), (48, 80), 0.95) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference_of_shares((9, 10), (3, 10), 0.95) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_what_is_no_share_is_refused() -> None:
    assert wilson(0, 0, 0.95) is None
    with pytest.raises(ValueError, match="3 of 2 rows is no share"):
        wilson(3, 2, 0.95)
    with pytest.raises(ValueError, match="confidence must lie"):
        wilson(1, 2, 1.0)
    with pytest.raises(ValueError, match="no rows has no interval"):
        difference_of_shares((0, 0), (1, 2), 0.95)
