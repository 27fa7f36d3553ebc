"""Metrics that need more than a name: a function of the user's own, and SQL that is run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag, field_validator

from tunesmith.base import Spec

SQL_EXECUTION = "sql_execution"
OF_PROMPT = "prompt"


def names_function(path: str) -> str:
    """A text that is `file.py:function`. Raises ValueError for another."""
    file, _, name = path.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{path!r} does not name a function: write file.py:function")
    return path


class PythonMetric(Spec):
    """What a function of yours says, averaged over rows."""

    python: str
    """`file.py:function`, called as `function(prompt: str, answer: str, references: list[str])` for every answer. It
    must return a finite number, larger for a better answer; the mean over rows is the metric, and the function's name
    is its name. It runs in this process with all that you may do; its hash is kept with the run."""

    @field_validator("python")
    @classmethod
    def _names_both(cls, path: str) -> str:
        return names_function(path)

    @property
    def name(self) -> str:
        return self.python.rpartition(":")[2]


class SqlMetric(Spec):
    """The share of answers that, run as SQL, give what the reference gives; its name is `sql_execution`."""

    sql: str
    """Where the tables are: `prompt` for the `CREATE TABLE` (and `INSERT`) statements in each row's prompt, or a file:
    an SQL script, or an SQLite database (`.db`, `.sqlite`). Queries run in memory, read only, with limits of time and
    rows; results are compared as multisets of rows. Tables without rows are filled with drawn ones, four times, and
    the results must agree each time (Zhong et al. 2020)."""

    @property
    def name(self) -> Literal["sql_execution"]:
        return SQL_EXECUTION


def _short_form(value: Any) -> Any:
    """`file.py:function` and `sql_execution` may stand as they are."""
    if value == SQL_EXECUTION:
        return {"sql": OF_PROMPT}
    return {"python": value} if isinstance(value, str) and value.rpartition(":")[0].endswith(".py") else value


def _which(value: Any) -> str:
    if isinstance(value, dict):
        return "sql" if "sql" in value else "python"
    return "sql" if isinstance(value, SqlMetric) else "python" if isinstance(value, PythonMetric) else "name"


OwnMetric = PythonMetric | SqlMetric
AskedMetric = Annotated[
    Annotated[str, Tag("name")] | Annotated[PythonMetric, Tag("python")] | Annotated[SqlMetric, Tag("sql")],
    Discriminator(_which),
    BeforeValidator(_short_form),
]
"""A name, or one of the above; `file.py:function` alone is a `PythonMetric`, `sql_execution` an `SqlMetric`."""


def name_of(metric: str | OwnMetric) -> str:
    """What a metric is called in reports and gates."""
    return metric if isinstance(metric, str) else metric.name
