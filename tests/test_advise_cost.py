"""Retrieval against tuning: the documents' example, break-even, prices of one's own, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from test_advise import Shell
from test_advise import shell as shell
from tunesmith.base import InputError
from tunesmith.pages.cost import cost_page
from tunesmith.plan.advise.cost import Use, compare_costs, read_prices

PACKAGED = (Path(__file__).parents[1] / "src/tunesmith/plan/advise/prices.yaml").read_text(encoding="utf-8")


def test_the_documents_example() -> None:
    """$100 and $0.02 a query against $200 a training each quarter and $50 a month."""
    costs = compare_costs(read_prices(), Use(queries=5000, months=12))
    assert (costs.rag, costs.tuned) == (100 + 0.02 * 60_000, 4 * 200 + 12 * 50)
    assert costs.break_even == pytest.approx((1400 - 100) / (0.02 * 12))
    at_even = compare_costs(read_prices(), Use(queries=costs.break_even or 0))
    assert at_even.rag == pytest.approx(at_even.tuned)
    assert "retrieval costs 1,300 USD and tuning 1,400 USD; they cost the same at 5,417" in costs.sentence


@pytest.mark.parametrize(
    ("every", "months", "changes"), [(3, 12, 3), (3, 13, 4), (math.inf, 24, 0), (12, 12, 0), (12, 13, 1), (0.5, 1, 1)]
)
def test_trainings_within_a_horizon(every: float, months: int, changes: int) -> None:
    assert Use(months=months, retrain_months=every).changes == changes


def test_month_by_month_ends_at_the_total() -> None:
    for use in (Use(), Use(queries=20_000), Use(months=7, retrain_months=12 / 52), Use(retrain_months=math.inf)):
        costs = compare_costs(read_prices(), use)
        assert costs.months[-1] == pytest.approx((costs.rag, costs.tuned))
        assert costs.months[0] == (100, 200)


def test_where_the_lines_cross() -> None:
    crossed = compare_costs(read_prices(), Use(queries=20_000))
    assert crossed.crossing is not None and crossed.tuned < crossed.rag
    rag, tuned = crossed.months[crossed.crossing]
    assert tuned < rag
    assert compare_costs(read_prices(), Use(queries=100)).crossing is None


def test_tokens_count_where_they_are_paid() -> None:
    prices = read_prices()
    paid = prices.model_copy(update={"rag": prices.rag.model_copy(update={"query": 0, "input_million": 1.0})})
    costs = compare_costs(paid, Use(queries=1000, months=10, prompt=100, retrieved=900))
    assert costs.lines[-1].rag == pytest.approx(1000 * 10 * 1000 / 1e6) and costs.lines[-1].tuned == 0


def test_one_that_is_never_overtaken() -> None:
    prices = read_prices()
    free = prices.model_copy(update={"tuned": prices.tuned.model_copy(update={"training": 0, "month": 0})})
    costs = compare_costs(free, Use())
    assert costs.break_even is None and "tuning is cheaper at any number" in costs.sentence


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("  month: 0  ", "  mnth: 0  "), "unknown price 'mnth'; did you mean 'month'?"),
        (("training: 200", "training: much"), "prices.yaml:18 tuned.training"),
        (("training: 200", "training: -1"), "should be greater than or equal to 0"),
        (("currency: USD", ""), "prices.yaml currency: this price is missing"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_bad_prices_are_said(
    change: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert change[0] in PACKAGED
    Path("prices.yaml").write_text(PACKAGED.replace(*change, 1))
    with pytest.raises(InputError) as caught:
        read_prices(Path("prices.yaml"))
    assert said in str(caught.value)
    with pytest.raises(InputError, match="the prices cannot be read"):
        read_prices(Path("missing.yaml"))


def test_a_horizon_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--months: 0 is too few"):
        compare_costs(read_prices(), Use(months=0))
    with pytest.raises(InputError, match="--queries: -1 is too few"):
        compare_costs(read_prices(), replace(Use(), queries=-1))


def test_the_page_has_the_chart_and_the_bill() -> None:
    page = cost_page(compare_costs(read_prices(), Use(queries=20_000)).as_json())
    assert "<svg" in page and "retrieval costs 4,900 USD" in page and "5,417 questions a month" in page
    assert "month</text>" in page and "http" not in page.replace("http-equiv", "")


def test_the_command(shell: Shell) -> None:
    code, said, wrong = shell.run("--cost", "--json", "--queries", "100", "--knowledge-changes", "never")
    found = json.loads(said)
    assert code == 0 and found["use"]["changes"] == 0 and found["use"]["retrain_months"] is None, wrong
    code, said, _ = shell.run("--cost", "--knowledge-changes", "weekly", "--html", "cost.html")
    assert code == 0 and "total" in said and "break" not in said and "out of date between two trainings" in said
    assert (shell.root / "cost.html").is_file()
    code, _, wrong = shell.run("--cost", "--html", "missing/cost.html")
    assert code == 2 and "the page cannot be written" in wrong
    (shell.root / "mine.yaml").write_text(PACKAGED.replace("training: 200", "training: 400"))
    code, said, _ = shell.run("--cost", "--prices", "mine.yaml", "--json")
    assert json.loads(said)["total"]["tuned"] == 4 * 400 + 600


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--cost", "--write", "x.yaml"], "--write"),
        (["--change", "style", "--html", "x.html"], "--html"),
        (["--change", "style", "--target", "0.4"], "--target"),
        (["--change", "style", "--months", "3"], "--months"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(shell: Shell, flags: list[str], where: str) -> None:
    code, _, wrong = shell.run(*flags)
    assert code == 2 and where in wrong and "would do nothing" in wrong
