"""From a recipe's `data` section to examples: read, check, split, render; everything lost is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.data.mix import RowOrder
from tunesmith.data.read import RowErrors, read_records
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.rows import BadRow, Row, to_rows
from tunesmith.data.spec import DataSpec, SourceSpec
from tunesmith.data.split import hold_back, hold_back_test
from tunesmith.files import file_sha256

Progress = Callable[[str, int, int | None], None]
CUT = "cut at the end of the answer"
"""Such a row is used; only its cut targets are lost."""


@dataclass(frozen=True)
class Lost:
    """Training rows that are not used, by reason."""

    reason: str
    rows: int
    target_tokens: int
    example: str


@dataclass(frozen=True)
class Prepared:
    """All rows of a job, ready for a model.

    Attributes:
        train, validation, test: rendered rows.
        order: the stream in which the training rows are visited.
        max_length: the length limit that was applied, in tokens.
        stop_ids: tokens that end an answer.
        lost: training rows that are not used.
        sources: path, format, rows and hash of every file.
        test_from, validation_from: where those rows came from, in words.
        notes: what a user should know.
    """

    train: list[Rendered]
    validation: list[Rendered]
    test: list[Rendered]
    order: RowOrder
    max_length: int
    stop_ids: set[int]
    lost: list[Lost]
    sources: list[dict[str, Any]]
    test_from: str
    validation_from: str
    template: str
    notes: list[str] = field(default_factory=list)

    def manifest(self) -> dict[str, Any]:
        """What `data.json` and the report say about the data."""
        return {
            "rows_used": len(self.train),
            "rows_lost": sum(lost.rows for lost in self.lost),
            "tokens": sum(len(item.example) for item in self.train),
            "target_tokens_used": sum(item.example.targets for item in self.train),
            "target_tokens_lost": sum(lost.target_tokens for lost in self.lost),
            "max_length": self.max_length,
            "template": self.template,
            "lost": [vars(lost) for lost in self.lost],
            "sources": self.sources,
            "validation": {"rows": len(self.validation), "from": self.validation_from} if self.validation else None,
            "test": {"rows": len(self.test), "from": self.test_from} if self.test else None,
            "notes": self.notes,
        }


def prepare(
    spec: DataSpec, renderer: Renderer, *, model_limit: int, seed: int, wants_test: bool, progress: Progress
) -> Prepared:
    """Does everything between files and examples.

    Args:
        model_limit: positions that the model has, in tokens.
        wants_test: whether rows are held back for a verdict when no test file is named.

    Raises:
        InputError: for anything wrong with the data or its settings.
    """
    sources, rows = _read_train(spec, progress)
    held = _Held(spec, seed, wants_test, sources)
    rows, validation, test = held.split(rows)
    lost = _Losses(renderer)
    rows = _without_duplicates(rows, spec, lost)
    rows = _without_overlap(rows, [*validation, *test], spec, lost)
    rows = _without_empty(rows, spec, lost)
    rendered = _rendered(rows, renderer, "rendering training rows", progress)
    longest = max((len(item.example) for item in rendered), default=0)
    limit = min(longest, model_limit) if spec.max_length == "auto" else spec.max_length
    if limit > model_limit:
        raise InputError(
            f"{limit} tokens are more than the model's {model_limit} positions",
            where="data.max_length",
            fix=f"use at most {model_limit}",
        )
    train = _within_length(rendered, limit, spec, lost)
    _refuse_untrainable(train)
    validation_rendered = _held_out(validation, renderer, model_limit, "validation", progress)
    test_rendered = _held_out(test, renderer, model_limit, "test", progress)
    weights = _source_weights(spec)
    notes = [f"{note} ({count} times)" if count > 1 else note for note, count in Counter(renderer.notes).items()]
    return Prepared(
        train=train,
        validation=validation_rendered,
        test=test_rendered,
        order=RowOrder([item.row.origin for item in train], weights, seed),
        max_length=limit,
        stop_ids=set(renderer.stop_ids),
        lost=lost.summary(),
        sources=sources,
        test_from=held.test_from,
        validation_from=held.validation_from,
        template=renderer.template.name,
        notes=notes,
    )


def source_specs(spec: DataSpec) -> list[SourceSpec]:
    """The training sources with the defaults of the section filled in."""
    given = [spec.train] if isinstance(spec.train, str) else spec.train
    if not given:
        raise InputError("the list is empty", where="data.train", fix="name at least one file")
    full = [SourceSpec(path=item) if isinstance(item, str) else item for item in given]
    return [
        item.model_copy(
            update={
                "format": spec.format if item.format == "auto" else item.format,
                "columns": item.columns or spec.columns,
            }
        )
        for item in full
    ]


def _source_weights(spec: DataSpec) -> list[float]:
    sources = source_specs(spec)
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) != len(sources):
        raise InputError(
            "some sources have a weight and some have none",
            where="data.train",
            fix="give every source a weight, or none",
        )
    return given


def _read_train(spec: DataSpec, progress: Progress) -> tuple[list[dict[str, Any]], list[Row]]:
    _source_weights(spec)
    sources, rows = [], []
    for index, source in enumerate(source_specs(spec)):
        progress(f"reading {source.path}", index, None)
        found, described = _read(source, spec, "train")
        rows += [replace(row, origin=index) for row in found]
        sources.append(described)
    return sources, rows


def _read(source: SourceSpec, spec: DataSpec, role: str) -> tuple[list[Row], dict[str, Any]]:
    records = read_records(source.path)
    name, rows = to_rows(
        records, format_name=source.format, columns=source.columns, answer_after=spec.answer_after, system=spec.system
    )
    path = Path(source.path).expanduser()
    digest = file_sha256(path) if path.is_file() else None
    return rows, {"path": source.path, "role": role, "format": name, "rows": len(rows), "sha256": digest}


class _Held:
    """Where validation and test rows come from."""

    def __init__(self, spec: DataSpec, seed: int, wants_test: bool, sources: list[dict[str, Any]]) -> None:
        self.spec, self.seed, self.wants_test, self.sources = spec, seed, wants_test, sources
        self.test_from = self.validation_from = ""

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
        test: list[Row] = []
        validation: list[Row] = []
        if isinstance(self.spec.test, str) and self.spec.test != "auto":
            test, self.test_from = self._file(self.spec.test, "test"), self.spec.test
        elif isinstance(self.spec.test, float):
            rows, test = hold_back(rows, _share(self.spec.test, "data.test"), seed=self.seed, key="data.test")
            self.test_from = f"{self.spec.test:.0%} of the training rows, held back before training"
        elif self.wants_test:
            rows, test = hold_back_test(rows, seed=self.seed)
            self.test_from = f"{len(test)} training rows, held back before training"
        if isinstance(self.spec.validation, str):
            validation, self.validation_from = self._file(self.spec.validation, "validation"), self.spec.validation
        elif isinstance(self.spec.validation, float):
            share = _share(self.spec.validation, "data.validation")
            rows, validation = hold_back(rows, share, seed=self.seed, key="data.validation")
            self.validation_from = f"{share:.0%} of the training rows, held back before training"
        return rows, validation, test

    def _file(self, path: str, role: str) -> list[Row]:
        source = SourceSpec(path=path, format=self.spec.format, columns=self.spec.columns)
        rows, described = _read(source, self.spec, role)
        self.sources.append(described)
        return rows


def _share(value: float, key: str) -> float:
    if not 0 < value < 1:
        raise InputError(f"{value} is not a fraction between 0 and 1", where=key, fix="use 0.1 for a tenth, or a path")
    return value


class _Losses:
    """Counts rows that are not used; their targets are counted by rendering them."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.found: dict[str, list[tuple[Row, int]]] = {}

    def add(self, reason: str, row: Row, targets: int | None = None) -> None:
        self.found.setdefault(reason, []).append((row, self._targets(row) if targets is None else targets))

    def _targets(self, row: Row) -> int:
        try:
            return self.renderer.render(row).example.targets
        except BadRow:
            return 0

    def summary(self) -> list[Lost]:
        return [
            Lost(reason, 0 if reason == CUT else len(rows), sum(n for _, n in rows), str(rows[0][0].source))
            for reason, rows in self.found.items()
        ]


def _without_duplicates(rows: list[Row], spec: DataSpec, lost: _Losses) -> list[Row]:
    if spec.duplicates == "keep":
        return rows
    first: dict[str, Row] = {}
    errors = RowErrors()
    for row in rows:
        earlier = first.setdefault(row.key, row)
        if earlier is not row:
            errors.add(row.source, f"the same row as {earlier.source}")
            lost.add("duplicate", row)
    if spec.duplicates == "error":
        errors.raise_any("remove them, or set data.duplicates: drop or keep")
    return list(first.values())


def _without_overlap(rows: list[Row], held: list[Row], spec: DataSpec, lost: _Losses) -> list[Row]:
    if spec.overlap == "keep" or not held:
        return rows
    prompts = {row.prompt_key: row for row in held}
    errors, kept = RowErrors(), []
    for row in rows:
        twin = prompts.get(row.prompt_key)
        if twin is None:
            kept.append(row)
        else:
            errors.add(row.source, f"the same prompt as {twin.source}, which is held out")
            lost.add("stands in the held-out rows", row)
    if spec.overlap == "error":
        errors.raise_any("remove them from training, or set data.overlap: drop or keep")
    if not kept:
        raise InputError(
            "every training row also stands in the held-out rows",
            where="data.overlap",
            fix="use other rows for validation and test; data.overlap: keep trains on them all the same",
        )
    return kept


def _without_empty(rows: list[Row], spec: DataSpec, lost: _Losses) -> list[Row]:
    errors, kept = RowErrors(), []
    for row in rows:
        said = [m["content"] for m in row.messages if m["role"] == "assistant" and not m.get("tool_calls")]
        if all(text.strip() for text in said) and (row.messages or row.text.strip()):
            kept.append(row)
        else:
            errors.add(row.source, "the answer is empty" if row.messages else "the text is empty")
            lost.add("empty", row)
    if spec.empty == "error":
        errors.raise_any("fill them in, or leave them out with data.empty: drop")
    return kept


def _rendered(rows: list[Row], renderer: Renderer, label: str, progress: Progress) -> list[Rendered]:
    rendered, errors = [], RowErrors()
    for index, row in enumerate(rows):
        if index % 500 == 0:
            progress(label, index, len(rows))
        try:
            rendered.append(renderer.render(row))
        except BadRow as error:
            errors.add(row.source, str(error))
    errors.raise_any("change these rows, or choose another data.template")
    return rendered


def _within_length(rendered: list[Rendered], limit: int, spec: DataSpec, lost: _Losses) -> list[Rendered]:
    errors, kept = RowErrors(), []
    for item in rendered:
        length = len(item.example)
        if length <= limit:
            kept.append(item)
        elif spec.overlong == "truncate" and (shorter := truncated(item, limit)) is not None:
            kept.append(shorter)
            lost.add(CUT, item.row, shorter.cut_targets)
        else:
            errors.add(item.row.source, f"{length} tokens, {length - limit} over the limit of {limit}")
            reason = "overlong" if spec.overlong == "drop" else "no answer left within max_length"
            lost.add(reason, item.row, item.example.targets)
    if spec.overlong == "error":
        errors.raise_any("raise data.max_length, or set data.overlong: drop or truncate")
    return kept


def truncated(item: Rendered, limit: int) -> Rendered | None:
    """Cuts the end of the answer; None when no target would be left."""
    example = item.example
    weights = example.tensors["target_weights"]
    if not bool((weights[:limit] > 0).any()):
        return None
    shorter = replace(example, token_ids=example.token_ids[:limit], tensors={"target_weights": weights[:limit]})
    return replace(
        item,
        example=shorter,
        cut_ids=tuple(example.token_ids[limit:].tolist()),
        cut_targets=int((weights[limit:] > 0).sum()),
    )


def _refuse_untrainable(train: list[Rendered]) -> None:
    if not train:
        raise InputError(
            "no training row is left", where="data.train", fix="see data.overlong, data.empty, data.overlap"
        )
    if not any(item.example.targets for item in train):
        raise InputError("nothing would be trained on: no row has a target token", where="data.train_on")


def _held_out(rows: list[Row], renderer: Renderer, limit: int, role: str, progress: Progress) -> list[Rendered]:
    """Rows for judging are never cut: one that the model cannot hold is an error."""
    filled = [row for row in rows if not row.messages or row.references[0].strip()]
    rendered = _rendered(filled, renderer, f"rendering {role} rows", progress)
    errors = RowErrors()
    for item in rendered:
        if len(item.example) > limit:
            errors.add(item.row.source, f"{len(item.example)} tokens do not fit into the model's {limit} positions")
    errors.raise_any(f"shorten these {role} rows or leave them out")
    if rows and not rendered:
        raise InputError(f"every {role} row has an empty answer", where=f"data.{role}")
    return rendered
