"""`tunesmith data check`: everything that can be said about rows before anybody trains on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.check import Finding
from tunesmith.data.defects import Defects, Splits, find_defects, find_unfit
from tunesmith.data.formats import PROMPTS
from tunesmith.data.ingest import Ingested, ingest
from tunesmith.data.inspection import inspect, inspecting_aside
from tunesmith.data.read import open_records
from tunesmith.data.record import RowErrors
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Row
from tunesmith.data.sources import readings
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import Stored
from tunesmith.data.token_file import tokens_of
from tunesmith.files import write_lines
from tunesmith.models.demo import demo_model_here
from tunesmith.models.load import load_tokenizer, locate_model, read_config, stop_token_ids
from tunesmith.models.measure import position_limit

LEVELS = ("problem", "warning", "note")
BINS = 12


@dataclass(frozen=True)
class Lengths:
    """How long the training rows are.

    Attributes:
        unit: `tokens` or `words`.
        counted_by: the model whose tokenizer and template counted, if there was one.
        values: one entry a row.
        limit: the longest row that can be used; None when that is not known.
    """

    unit: str
    counted_by: str | None
    values: np.ndarray
    limit: int | None

    def as_json(self) -> dict[str, Any]:
        values = self.values
        edges = bin_edges(values)
        counts, _ = np.histogram(values, edges) if len(values) else (np.zeros(len(edges) - 1, int), edges)
        quantiles = {f"p{at}": int(np.percentile(values, at)) if len(values) else 0 for at in (50, 90, 99)}
        return {
            "unit": self.unit,
            "counted_by": self.counted_by,
            "limit": self.limit,
            "total": int(values.sum()),
            "least": int(values.min(initial=0) if not len(values) else values.min()),
            "most": int(values.max(initial=0)),
            **quantiles,
            "histogram": [
                {"from": int(low), "to": int(high), "rows": int(count)}
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            ],
        }


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Whole-numbered edges of about a dozen bins; the last bin holds its upper edge too."""
    low, high = (int(values.min()), int(values.max()) + 1) if len(values) else (0, 1)
    step = max(1, -(-(high - low) // BINS))
    return np.arange(low, high + step, step)


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        findings: problems first, then warnings and notes.
        dropped: for each training row that a cleaned file would not have, why.
        refused: whether training would refuse the data as it is.
    """

    ingested: Ingested
    splits: Splits
    lengths: Lengths
    findings: list[Finding]
    dropped: dict[int, str]
    refused: bool

    def as_json(self) -> dict[str, Any]:
        held = {name: len(numbers) for name, numbers in self.splits.held.items()}
        return {
            "ok": not self.refused,
            "sources": [source.as_json() for source in self.ingested.sources],
            "notes": [note for source in self.ingested.sources for note in source.notes],
            "rows": {"train": len(self.splits.train), "held_out": held, "wrong": self.ingested.errors.count},
            "lengths": self.lengths.as_json(),
            "findings": [finding.as_json() for finding in self.findings],
        }


@dataclass(frozen=True)
class Counting:
    """The model by whose tokens lengths are measured."""

    name: str
    renderer: Renderer
    limit: int


def counting_model(path: str | None, spec: DataSpec, progress: Progress = silent) -> Counting | None:
    """The model by whose tokens rows are measured: the one that is named, or the demo model where it is here already.

    Raises:
        InputError: when the model that is named has no configuration or tokenizer.
    """
    if path is None:
        demo = demo_model_here()
        if demo is None:
            return None
        path = str(demo)
    location = locate_model(path, progress)
    config = read_config(location)
    tokenizer = load_tokenizer(location)
    renderer = Renderer.of(spec, tokenizer, stop_token_ids(tokenizer, config, location))
    return Counting(Path(path).name, renderer, position_limit(config))


def check_data(
    spec: DataSpec, *, held: Sequence[str] = (), counting: Counting | None = None, progress: Progress = silent
) -> Checked:
    """Reads rows as a run with this `data` section would, and looks for everything that is wrong with them.

    Args:
        held: files to hold the training rows against, besides those that the section names.
        counting: the model that is to be trained; without one lengths are counted in words.

    Raises:
        InputError: for sources that cannot be read at all.
    """
    ingested = ingest(readings(spec, held), progress, refused=(PROMPTS[0],))
    rows = ingested.rows
    if not len(rows) and not ingested.errors.count:
        ingested.refuse_wrong_rows()
    splits = _splits(ingested)
    defects = find_defects(ingested, splits, spec)
    looked_through = _looked_through(defects, splits)
    if counting is None:
        lengths = _words(rows, splits.train, progress)
    else:
        with inspecting_aside(rows, looked_through, spec.benchmarks, progress):
            stored = Stored(rows, tokens_of(rows, counting.renderer, progress))
        limit = counting.limit if spec.max_length == "auto" else min(spec.max_length, counting.limit)
        find_unfit(defects, stored, splits, limit, spec)
        lengths = Lengths("tokens", counting.name, stored.lengths(splits.train), limit)
    refused = any(finding.level == "problem" for finding in defects.findings)
    inspection = inspect(rows, looked_through, spec.benchmarks, progress)
    for finding in inspection.findings:
        defects.add(finding, inspection.flagged.get(finding.kind, ()), finding.kind.replace("-", " "))
    findings = sorted(defects.findings, key=lambda finding: LEVELS.index(finding.level))
    return Checked(ingested, splits, lengths, findings, defects.dropped, refused)


def _splits(ingested: Ingested) -> Splits:
    """Training rows, and the rows of each file that is held out."""
    sources = ingested.rows.index["source"]
    roles = [source.role for source in ingested.sources]
    train = np.nonzero(np.isin(sources, [at for at, role in enumerate(roles) if role in ("train", "replay")]))[0]
    held = {
        source.path: np.nonzero(sources == at)[0]
        for at, source in enumerate(ingested.sources)
        if source.role not in ("train", "replay")
    }
    return Splits(train, held)


def _words(rows: Any, numbers: np.ndarray, progress: Progress) -> Lengths:
    counts = np.zeros(len(numbers), np.int64)
    for at, (_, row) in enumerate(rows.read(numbers)):
        if at % 5000 == 0:
            progress("counting words", at, len(numbers))
        counts[at] = sum(len(text.split()) for text in _texts(row))
    return Lengths("words", None, counts, None)


def _texts(row: Row) -> Iterator[str]:
    yield row.text
    yield from row.words
    for message in row.messages:
        yield message["content"]


def _looked_through(defects: Defects, splits: Splits) -> dict[str, np.ndarray]:
    """The rows whose content is checked: those that are not doubled or empty, for what is found is not found again."""
    dropped = np.fromiter(defects.dropped, np.int64, len(defects.dropped))
    held = np.concatenate([np.zeros(0, np.int64), *splits.held.values()])
    return {"train": splits.train[~np.isin(splits.train, dropped)], "test": held}


@dataclass(frozen=True)
class Fixed:
    """A cleaned copy of the training data.

    Attributes:
        path, dropped_path: the cleaned rows, and what was left out with the reason, as JSON lines.
        kept, dropped: rows.
    """

    path: Path
    dropped_path: Path
    kept: int
    dropped: int


def write_fixed(checked: Checked, spec: DataSpec, out: Path) -> Fixed:
    """Writes the training rows without those that were flagged, in their own columns, and a list of what was dropped.

    Raises:
        InputError: when ``out`` exists, is no `.jsonl`, or cannot be written.
    """
    if out.suffix != ".jsonl":
        raise InputError("the cleaned rows are written as JSON lines", where=out, fix="name a file that ends in .jsonl")
    list_path = out.with_name(f"{out.stem}.dropped.jsonl")
    for path in (out, list_path):
        if path.exists():
            raise InputError("the file exists already", where=path, fix="name a new file, or move that one away")
    try:
        dropped = write_lines(list_path, _reasons(checked))
        kept = write_lines(out, _kept_lines(checked, spec))
    except OSError as error:
        list_path.unlink(missing_ok=True)
        raise InputError(
            f"cannot be written: {error.strerror}", where=out, fix="name a file in a directory that can be written"
        ) from error
    return Fixed(out, list_path, kept, dropped)


def _reasons(checked: Checked) -> Iterator[str]:
    with open(checked.ingested.all_errors, encoding="utf-8") as wrong:
        yield from wrong
    for number, reason in sorted(checked.dropped.items()):
        row = checked.ingested.rows[number]
        yield json.dumps({"source": str(row.source), "what": reason}, ensure_ascii=False) + "\n"


def _kept_lines(checked: Checked, spec: DataSpec) -> Iterator[str]:
    """The rows that stay, as their files have them; trees of conversations are written as messages."""
    rows, train = checked.ingested.rows, checked.splits.train
    dropped = np.fromiter(checked.dropped, np.int64, len(checked.dropped))
    kept = train[~np.isin(train, dropped)]
    for at, (reading, source) in enumerate(zip(readings(spec), checked.ingested.sources, strict=False)):
        numbers = kept[rows.index["source"][kept] == at]
        if source.format == "openassistant":
            for _, row in rows.read(numbers):
                yield json.dumps({"messages": row.messages}, ensure_ascii=False) + "\n"
            continue
        lines = set(rows.index["line"][numbers].tolist())
        for record in open_records(reading[0], RowErrors()) if lines else ():
            if record.source.line in lines:
                yield json.dumps(record.fields, ensure_ascii=False, default=str) + "\n"
