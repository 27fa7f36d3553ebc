"""Metrics of JSON and SQL, functions of the user's own, calibration: by hand, and that hostile queries do nothing."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import choose_metrics, compare_metrics, metric_rows
from tunesmith.metrics import confidence_rows, metric
from tunesmith.metrics.spec import PythonMetric, SqlMetric
from tunesmith.metrics.sql import SqlError, reference_result, schema_in, sql_match
from tunesmith.pipeline.loaded import judged_rows, load_speaker
from tunesmith.pipeline.own_metrics import OwnMetrics, unscored
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_file import check_recipe

SCHEMA = "CREATE TABLE head (age INTEGER, born_state VARCHAR, name TEXT)"
PROMPT = f"{SCHEMA}\n\nHow many heads are older than 56?"


def judged(answers: list[str], reference: str, prompt: str = PROMPT) -> list[Judged]:
    return [Judged(f"rows:{at}", prompt, [reference], answer, "stop", 1.0, 2) for at, answer in enumerate(answers, 1)]


# --- JSON ---

REFERENCE = '{"name": "Ada", "age": 36, "tags": ["a", "b"], "empty": {}}'


@pytest.mark.parametrize(
    ("answer", "valid", "fields"),
    [
        (REFERENCE, 1.0, 1.0),
        ('{"tags": ["a", "b"], "age": 36.0, "empty": {}, "name": "Ada"}', 1.0, 1.0),
        ('{"name": "Ada", "age": 37, "tags": ["a", "b"], "empty": {}}', 1.0, 4 / 5),
        ('{"name": "Ada", "tags": ["a"], "more": 1}', 1.0, 2 / 6),
        ('{"name": "Ada", "age": true, "tags": ["b", "a"], "empty": {}}', 1.0, 2 / 5),
        ("[1]", 1.0, 0.0),
        ('Sure: {"name": "Ada"}', 0.0, 0.0),
        ('{"age": NaN}', 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_json_answers(answer: str, valid: float, fields: float) -> None:
    assert metric("json_valid").rows([answer], [[REFERENCE]]).corpus() == valid
    assert metric("json_fields").rows([answer], [[REFERENCE]]).corpus() == pytest.approx(fields)


def test_the_best_reference_counts_and_a_reference_that_is_no_json_is_named() -> None:
    assert metric("json_fields").rows(["[2]"], [["[1]", "[2]"]]).corpus() == 1.0
    with pytest.raises(InputError, match="json_fields compares JSON, and the reference 'no' is none"):
        metric("json_fields").rows(["[2]"], [["no"]])


# --- SQL ---

COUNT = "SELECT COUNT(*) FROM head WHERE age > 56"


@pytest.mark.parametrize(
    ("query", "right"),
    [
        ("select count(1) from head where age >= 57", 1.0),
        ("SELECT COUNT(*) FROM head WHERE NOT age <= 56;", 1.0),
        ("SELECT COUNT(*) FROM head WHERE age > 55", 0.0),
        ("SELECT COUNT(*) FROM head", 0.0),
        ("SELECT age FROM head WHERE age > 56", 0.0),
        ("SELECT COUNT(*) FROM heads", 0.0),
        ("", 0.0),
        ("about fifty", 0.0),
    ],
)
def test_queries_are_compared_by_what_they_give(query: str, right: float) -> None:
    assert sql_match(query, reference_result(COUNT, SCHEMA)) == right


def test_results_are_multisets_of_rows() -> None:
    filled = f"{SCHEMA}; INSERT INTO head VALUES (1, 'x', 'Ann'), (2, 'x', 'Bob'), (3, 'y', 'Ann')"
    wanted = reference_result("SELECT name FROM head", filled)
    assert len(wanted.databases) == 1 and wanted.results[0] == {("Ann",): 2, ("Bob",): 1}
    assert sql_match("SELECT name FROM head ORDER BY age DESC", wanted) == 1.0
    assert sql_match("SELECT DISTINCT name FROM head", wanted) == 0.0
    nothing = reference_result("SELECT name FROM head WHERE age > 9", filled)
    assert nothing.says and sql_match("SELECT name FROM head WHERE age > 8", nothing) == 1.0


def test_drawn_rows_meet_conditions_and_joins_and_are_the_same_every_time() -> None:
    schema = "CREATE TABLE a (id INT, name TEXT); CREATE TABLE b (a_id INT, town TEXT, price REAL)"
    query = (
        "SELECT a.name FROM a JOIN b ON a.id = b.a_id WHERE b.town = 'Łódź' AND b.price > 12.5 AND a.name LIKE '%ann%'"
    )
    wanted = reference_result(query, schema)
    assert wanted.says and len(wanted.databases) == 4
    reference_result.cache_clear()
    assert reference_result(query, schema) == wanted
    assert sql_match(query.replace("> 12.5", ">= 12.5"), wanted) == 0.0


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE head",
        "INSERT INTO head VALUES (1, 'a', 'b')",
        "ATTACH DATABASE '{file}' AS other",
        "PRAGMA table_info(head)",
        "SELECT load_extension('{file}')",
        "SELECT 1; DROP TABLE head",
        "VACUUM INTO '{file}'",
        "SELECT random()",
        "SELECT zeroblob(1000000000)",
        "SELECT a.age FROM head a, head b, head c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
    ],
)
def test_a_hostile_query_does_nothing_and_ends(query: str, tmp_path: Path) -> None:
    began = time.monotonic()
    for text in (query, f"SELECT age FROM head WHERE age IN ({query})"):
        assert sql_match(text.format(file=tmp_path / "x.db"), reference_result(COUNT, SCHEMA)) == 0.0
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 30


def test_a_schema_that_does_not_run_is_an_error() -> None:
    with pytest.raises(SqlError, match="the schema creates no table"):
        reference_result("SELECT 1", "")
    with pytest.raises(SqlError, match="the schema does not run: near"):
        reference_result("SELECT 1", "CREATE TABLE 1-2 (a)")
    with pytest.raises(SqlError, match="the schema does not run"):
        reference_result("SELECT 1", "ATTACH DATABASE 'x' AS y")
    with pytest.raises(SqlError, match="no such column"):
        reference_result("SELECT b FROM a", "CREATE TABLE a (c INT)")


def test_schemas_are_found_in_prompts() -> None:
    two = "CREATE TABLE a (x INT);\nCREATE TABLE b (y VARCHAR(20), z INT)\n\nHow many (in all)?"
    assert schema_in(two) == "CREATE TABLE a (x INT);\nCREATE TABLE b (y VARCHAR(20), z INT);"
    assert schema_in("create table t (x TEXT DEFAULT ')') insert into t values ('a')\nWhy?") == (
        "create table t (x TEXT DEFAULT ')');\ninsert into t values ('a');"
    )
    assert schema_in("Which table?") == "" and schema_in("CREATE TABLE a (x") == "CREATE TABLE a (x;"


def test_sql_is_scored_where_the_tables_are(tmp_path: Path) -> None:
    rows = judged([COUNT, "SELECT 1"], COUNT)
    script, database = tmp_path / "schema.sql", tmp_path / "rows.db"
    script.write_text(SCHEMA, encoding="utf-8")
    with sqlite3.connect(database) as connection:
        connection.execute(SCHEMA)
        connection.execute("INSERT INTO head VALUES (60, 'x', 'Ann'), (61, 'x', 'Bob')")
    for source in ("prompt", str(script), str(database)):
        own = OwnMetrics.of([SqlMetric(sql=source)])
        assert [row.scores for row in own.scored(rows)] == [{"sql_execution": 1.0}, {"sql_execution": 0.0}]
        assert bool(own.record) == (source != "prompt")
    broken = OwnMetrics.of([SqlMetric(sql="prompt")]).scored(judged(["SELECT 1"], "SELECT nothing"))
    assert broken[0].scores == {}
    assert unscored(broken, ["sql_execution"]) == [
        "sql_execution leaves out 1 of 1 rows, the first rows:1: their reference query does not run, or gives nothing "
        "to compare with"
    ]
    assert metric_rows("sql_execution", broken) is None
    (tmp_path / "no.db").write_text("no database at all, but long enough to look like one" * 40, encoding="utf-8")
    with pytest.raises(InputError, match="this is no SQLite database"):
        OwnMetrics.of([SqlMetric(sql=str(tmp_path / "no.db"))])
    with pytest.raises(InputError, match="cannot be read: No such file"):
        OwnMetrics.of([SqlMetric(sql=str(tmp_path / "none.sql"))])


# --- functions of the user's own ---


def test_a_function_of_the_users_own_is_a_metric(tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text("def polite(prompt, answer, references):\n    return 'please' in answer\n", encoding="utf-8")
    own = OwnMetrics.of([PythonMetric(python=f"{code}:polite")])
    base, tuned = (own.scored(judged(answers, "x")) for answers in (["now", "no"], ["please", "no"]))
    (entry,), warnings = compare_metrics(["polite"], base, tuned, EvaluateSpec(resamples=50), seed=0)
    assert (entry["base"], entry["tuned"], entry["better"], warnings) == (0.0, 0.5, "higher", [])
    assert len(own.record[f"{code}:polite"]) == 64
    with pytest.raises(InputError, match="there is no function 'rude' in this file") as caught:
        OwnMetrics.of([PythonMetric(python=f"{code}:rude")])
    assert caught.value.fix == "it has polite" and str(caught.value.where).startswith("evaluate.metrics")
    code.write_text("def polite(prompt, answer, references):\n    return None\n", encoding="utf-8")
    with pytest.raises(InputError, match="the metric function gave None, which is no finite number"):
        OwnMetrics.of([PythonMetric(python=f"{code}:polite")]).scored(judged(["a"], "x"))


def recipe(metrics: list[Any], **more: Any) -> Any:
    return check_recipe({"model": "m", "data": {"train": "t"}, "evaluate": {"metrics": metrics}, **more}, "recipe.yaml")


def test_own_metrics_in_a_recipe() -> None:
    found = recipe(["f1", "a.py:polite", {"python": "b.py:kind"}, "sql_execution"], gate={"polite": 0.1})
    assert found.evaluate.metric_names == ["f1", "polite", "kind", "sql_execution"]
    assert found.evaluate.own_metrics[2] == SqlMetric(sql="prompt")
    assert (
        choose_metrics(found.evaluate.metric_names, ["x"], ["polite", "kind", "sql_execution"])[0][-1] == "perplexity"
    )
    assert recipe(["reward_accuracy"]).evaluate.metric_names == ["reward_accuracy"]
    for metrics, what in (
        (["a.py:f1"], "there is another metric called f1"),
        (["a.py:x", "b.py:x"], "there is another metric called x"),
        ([{"python": "a.txt:x"}], "does not name a function"),
        (["polit"], "unknown metric 'polit'"),
    ):
        with pytest.raises(InputError, match=what):
            recipe(metrics)


# --- calibration, and bits per byte of answers ---


def test_the_confidence_of_an_answer_is_the_product_of_its_tokens(tiny_model: Path, tmp_path: Path) -> None:
    speaker = load_speaker(str(tiny_model), dtype="fp32")
    data = DataSpec(train=str(write_jsonl(tmp_path / "rows.jsonl", colour_rows(5))))
    spec = EvaluateSpec(metrics=["calibration_error", "accuracy", "bits_per_byte"], max_new_tokens=5)
    rows, names = judged_rows(speaker, data, spec)
    assert names == ["calibration_error", "accuracy", "bits_per_byte", "perplexity"]
    prompt = speaker.renderer.prompt_ids([{"role": "user", "content": rows[0].prompt}])
    expected, ids = 1.0, list(prompt)
    for _ in range(5):
        likely, token = speaker.model(torch.tensor([ids])).logits[0, -1].softmax(0).max(0)
        expected, ids = expected * float(likely.detach()), [*ids, int(token)]
        if int(token) in speaker.renderer.stop_ids:
            break
    assert rows[0].confidence == pytest.approx(expected, rel=1e-3)
    assert rows[0].bytes == len(colour_rows(1)[0]["completion"].encode())


def test_some_rows_of_a_sorted_file_are_drawn_from_all_of_it(tiny_model: Path, tmp_path: Path) -> None:
    speaker = load_speaker(str(tiny_model), dtype="fp32")
    data = DataSpec(train=str(write_jsonl(tmp_path / "rows.jsonl", colour_rows(40))))
    spec = EvaluateSpec(metrics=["perplexity"], rows=8)
    judged, _ = judged_rows(speaker, data, spec)
    lines = [int(row.source.rsplit(":", 1)[1]) for row in judged]
    assert len(lines) == 8 and lines == sorted(lines) and max(lines) > 20
    assert [row.source for row in judged_rows(speaker, data, spec)[0]] == [row.source for row in judged]


def test_calibration_error_by_hand() -> None:
    # 0.95 three times, two right: |2 / 3 - 0.95|; 0.55 once, wrong
    found = confidence_rows([0.95, 0.95, 0.95, 0.55], [1, 1, 0, 0])
    assert found.corpus() == pytest.approx((abs(2 - 3 * 0.95) + 0.55) / 4)
    assert confidence_rows([1.0, 1.0], [1, 1]).corpus() == 0.0
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1.0, 20_000)
    assert confidence_rows(sure, rng.uniform(size=20_000) < sure).corpus() < 0.02
    rows = [Judged("r:1", "p", ["Yes"], "yes", None, 1.0, 1, confidence=0.8)] * 4
    stat = metric_rows("calibration_error", rows)
    assert stat is not None and stat.corpus() == pytest.approx(0.2)
