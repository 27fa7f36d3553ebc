"""Whether two SQL queries give the same result, found by running them in SQLite, in memory and fenced in.

Execution accuracy compares results instead of texts (Yu et al. 2018, Spider). Where a schema comes without rows, every
query gives nothing, so tables are filled with drawn rows, several times, and the results must agree on all of them: the
idea of test suites (Zhong et al. 2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites").
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from time import monotonic
from typing import Any

DATABASES, ROWS = 4, 40
"""How often empty tables are filled, and with how many rows each."""
MOST_ROWS = 10_000
"""A result with more rows than this is none."""
MOST_STEPS = 5_000_000
"""Steps of SQLite's machine that a query may take, about a second: a count, and so the same on every machine."""
MOST_SECONDS = 10.0
"""For queries whose single steps are long."""
MOST_BYTES = 1_000_000
"""Of any one text or blob."""
_OFTEN = 1000
_READS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_NEVER = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA})
_UNREPEATABLE = frozenset({"random", "randomblob", "load_extension"})
_STRING = re.compile(r"'((?:[^']|'')*)'")
_NUMBER = re.compile(r"(?<![\w.'])-?\d+(?:\.\d+)?(?![\w.'])")
_COMPARED = re.compile(
    r"""(?:(\w+)|"([^"]+)"|`([^`]+)`|\[([^\]]+)\])\s*(?:=|<>|!=|<=?|>=?|\bLIKE\b)\s*('(?:[^']|'')*'|-?\d+(?:\.\d+)?)""",
    re.I,
)
_STATEMENT = re.compile(r"\bCREATE\s+TABLE\b[^(;]*\(|\bINSERT\s+INTO\b", re.I)
_PIECE = re.compile(r"'(?:[^']|'')*'|[();]|[^'();]+|'")

Result = Counter[tuple[Any, ...]]
"""The rows of a result, each with how often it stands there: order does not count."""


class SqlError(ValueError):
    """A query or a schema does not run, or not within the limits."""


@dataclass(frozen=True)
class Wanted:
    """What a reference query gives.

    Attributes:
        databases: images of the databases that it was run on.
        results: of each.
        says: whether any result has a row; if none has, agreeing with it on drawn rows means nothing.
    """

    databases: tuple[bytes, ...]
    results: tuple[Result, ...]
    says: bool


def sql_match(query: str, wanted: Wanted) -> float:
    """1 when a query gives what the reference gave, on every database; 0 also for one that does not run."""
    for database, result in zip(wanted.databases, wanted.results, strict=True):
        try:
            with closing(_opened(database)) as connection:
                found = _run(connection, query)
        except SqlError:
            return 0.0
        if found != result:
            return 0.0
    return 1.0


@lru_cache(maxsize=2048)
def reference_result(query: str, schema: str) -> Wanted:
    """Runs a reference query on the databases that a schema gives.

    Args:
        schema: `CREATE TABLE` statements, with `INSERT` statements or without; empty tables are filled by chance that
            depends on schema and query alone.

    Raises:
        SqlError: schema or query do not run.
    """
    bare = _created(schema)
    with closing(_opened(bare)) as connection:
        empty = [name for name in _tables(connection) if not _has_rows(connection, name)]
    images = [bare]
    if empty:
        seed = int.from_bytes(blake2b(f"{schema}\0{query}".encode(), digest_size=8).digest(), "big")
        images = [_filled(bare, empty, query, random.Random(seed + at)) for at in range(DATABASES)]
    return _wanted(images, query, drawn=bool(empty))


@lru_cache(maxsize=2048)
def result_in_database(query: str, database: bytes) -> Wanted:
    """Runs a reference query on a database with rows of its own. Raises SqlError when it does not run."""
    return _wanted([database], query, drawn=False)


def database_image(path: str) -> bytes:
    """The content of a database file. Raises SqlError when it is none."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connection.serialize()
    except sqlite3.Error as error:
        raise SqlError(str(error)) from error


def schema_in(text: str) -> str:
    """The `CREATE TABLE` and `INSERT` statements that stand in a text, in order; empty without any.

    The first kind ends with the parenthesis that closes it, the second with a semicolon or a line.
    """
    found, at = [], 0
    while begun := _STATEMENT.search(text, at):
        creates = begun[0].endswith("(")
        depth, at = int(creates), begun.end()
        while depth and (piece := _PIECE.match(text, at)):
            depth += (piece[0] == "(") - (piece[0] == ")")
            at = piece.end()
        if not creates:
            at = min(place for sign in ";\n" if (place := (text + sign).find(sign, at)) >= 0)
        found.append(text[begun.start() : at].strip() + ";")
    return "\n".join(found)


def _wanted(images: Sequence[bytes], query: str, *, drawn: bool) -> Wanted:
    results = []
    for image in images:
        with closing(_opened(image)) as connection:
            results.append(_run(connection, query))
    return Wanted(tuple(images), tuple(results), not drawn or any(_says(result) for result in results))


def _says(result: Result) -> bool:
    """Whether anything stands in a result beside the zero or nothing that an aggregate gives of no row."""
    return any(value not in (None, 0) for row in result for value in row)


def _created(schema: str) -> bytes:
    with closing(sqlite3.connect(":memory:")) as connection:
        _fence(connection, writes=True)
        try:
            connection.executescript(schema)
            connection.commit()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise SqlError(f"the schema does not run: {error}") from error
        connection.set_authorizer(None)
        if not _tables(connection):
            raise SqlError("the schema creates no table")
        return connection.serialize()


def _opened(image: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(image)
    return connection


def _run(connection: sqlite3.Connection, query: str) -> Result:
    _fence(connection, writes=False)
    try:
        # one statement only: execute refuses a second one
        rows = connection.execute(query.strip().rstrip(";")).fetchmany(MOST_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        raise SqlError(str(error)) from error
    if len(rows) > MOST_ROWS:
        raise SqlError(f"more than {MOST_ROWS:,} rows")
    return Counter(tuple(_rounded(value) for value in row) for row in rows)


def _rounded(value: Any) -> Any:
    return float(f"{value:.9g}") if isinstance(value, float) else value  # sums depend on the order of rows


def _fence(connection: sqlite3.Connection, *, writes: bool) -> None:
    """Nothing but reading, or creating tables; nothing outside memory; limits of time and size."""

    def allowed(action: int, first: str | None, second: str | None, *_: Any) -> int:
        named = (second or "").casefold() in _UNREPEATABLE and action == sqlite3.SQLITE_FUNCTION
        refused = action in _NEVER or named or (not writes and action not in _READS)
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    steps, end = 0, monotonic() + MOST_SECONDS

    def too_long() -> int:
        nonlocal steps
        steps += _OFTEN
        return int(steps > MOST_STEPS or monotonic() > end)

    connection.set_authorizer(allowed)
    connection.set_progress_handler(too_long, _OFTEN)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)


def _tables(connection: sqlite3.Connection) -> list[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return [name for (name,) in found]


def _has_rows(connection: sqlite3.Connection, table: str) -> bool:
    return connection.execute(f"SELECT 1 FROM {_quoted(table)} LIMIT 1").fetchone() is not None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _filled(image: bytes, tables: Sequence[str], query: str, drawn: random.Random) -> bytes:
    """The database with rows in its empty tables, many of which meet the conditions of a query."""
    texts = [text.replace("''", "'") for text in _STRING.findall(query)]
    numbers = [float(text) for text in _NUMBER.findall(_STRING.sub(" ", query))]
    compared: dict[str, list[str]] = {}
    for *names, literal in _COMPARED.findall(query):
        compared.setdefault("".join(names).casefold(), []).append(literal)
    with closing(_opened(image)) as connection:
        for table in tables:
            columns = connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
            marks = ", ".join("?" * len(columns))
            for _ in range(ROWS):
                row = [
                    _value(drawn, kind, texts, numbers, compared.get(name.casefold(), ()))
                    for _, name, kind, *_ in columns
                ]
                # a row that breaks a constraint is left out
                connection.execute(f"INSERT OR IGNORE INTO {_quoted(table)} VALUES ({marks})", row)
        connection.commit()
        return connection.serialize()


def _value(
    drawn: random.Random, kind: str, texts: Sequence[str], numbers: Sequence[float], here: Sequence[str]
) -> str | int | float:
    """One value of a column: often what the query compares it with, sometimes that and one, else one of a few."""
    if here and drawn.random() < 0.6:
        literal = drawn.choice(here)
        if literal.startswith("'"):
            return literal[1:-1].replace("''", "'").replace("%", "").replace("_", "x")
        return float(literal) + drawn.choice((0, 0, 0, -1, 1))
    is_number = re.search(r"INT|REAL|NUM|FLOA|DOUB|DEC", kind, re.I) is not None
    if is_number and numbers and drawn.random() < 0.3:
        return drawn.choice(numbers) + drawn.choice((-1, 0, 1))
    if is_number:
        return drawn.randint(1, 9)
    if texts and drawn.random() < 0.3:
        return drawn.choice(texts)
    return f"value {drawn.randint(1, 9)}"
