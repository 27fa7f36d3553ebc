"""From a recipe's `data` section to examples: read, check, split, render; everything lost is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.base import InputError
from tunesmith.data.clean import (
    Losses,
    Lost,
    truncated,
    with_targets,
    within_length,
    without_duplicates,
    without_empty,
    without_overlap,
)
from tunesmith.data.formats import BadRow
from tunesmith.data.mix import RowOrder, shares
from tunesmith.data.read import RowErrors, read_records
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.rows import Row, to_rows
from tunesmith.data.spec import DataSpec, SourceSpec
from tunesmith.data.split import hold_back, hold_back_test
from tunesmith.files import file_sha256

Progress = Callable[[str, int, int | None], None]
T = TypeVar("T")


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
    lost, notes = Losses(renderer), list[str]()
    rows = without_duplicates(rows, spec, lost)
    rows, empty = without_empty(rows, spec)
    for row in empty:
        lost.add("empty", row)
    held = _Held(spec, seed, wants_test, sources, notes)
    rows, validation, test = held.split(_some(rows))
    rows = without_overlap(rows, [*validation, *test], spec, lost)
    rendered = _rendered(rows, renderer, "rendering training rows", progress)
    longest = max((len(item.example) for item in rendered), default=0)
    limit = min(longest, model_limit) if spec.max_length == "auto" else spec.max_length
    if limit > model_limit:
        raise InputError(
            f"{limit} tokens are more than the model's {model_limit} positions",
            where="data.max_length",
            fix=f"use at most {model_limit}",
        )
    kept = within_length(rendered, limit, limit == model_limit, spec, lost)
    train = with_targets(_some(kept), lost)
    judged = [
        _fitting(
            _rendered(some, renderer, f"rendering {role} rows", progress), model_limit, spec, role=role, notes=notes
        )
        for role, some in (("validation", validation), ("test", test))
    ]
    notes += [f"{note} ({count} times)" if count > 1 else note for note, count in Counter(renderer.notes).items()]
    return Prepared(
        train=train,
        validation=judged[0],
        test=judged[1],
        order=_order(train, spec, seed),
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


def _order(train: list[Rendered], spec: DataSpec, seed: int) -> RowOrder:
    """Raises InputError when a source with a weight could give no row to an epoch."""
    weights, origins = _source_weights(spec), [item.row.origin for item in train]
    counts = shares(weights, len(train)) if weights else []
    for index, source in enumerate(source_specs(spec) if weights else []):
        if index not in origins:
            raise InputError(
                f"no row of {source.path} is left, so its weight cannot be kept",
                where=f"data.train.{index}.weight",
                fix="see data.duplicates, data.overlap, data.empty and data.overlong, or remove this source",
            )
        if not counts[index]:
            raise InputError(
                f"with this weight none of an epoch's {len(train)} rows comes from {source.path}",
                where=f"data.train.{index}.weight",
                fix="raise the weight, or remove this source",
            )
    return RowOrder(origins, weights, seed)


@dataclass
class _Held:
    """Where validation and test rows come from."""

    spec: DataSpec
    seed: int
    wants_test: bool
    sources: list[dict[str, Any]]
    notes: list[str]
    test: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test_from: str = ""
    validation_from: str = ""

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
        """The rows that are trained on, those of validation, and those of the test."""
        if isinstance(self.spec.test, str) and self.spec.test != "auto":
            self.test, self.test_from = self._file(self.spec.test, "test"), self.spec.test
        elif isinstance(self.spec.test, float):
            rows, self.test = hold_back(rows, _share(self.spec.test, "data.test"), seed=self.seed, key="data.test")
            self.test_from = f"{self.spec.test:.0%} of the training rows, held back before training"
        elif self.wants_test:
            rows, self.test = hold_back_test(rows, seed=self.seed)
            self.test_from = f"{len(self.test)} training rows, held back before training"
        if isinstance(self.spec.validation, str):
            self.validation = self._file(self.spec.validation, "validation")
            self.validation_from = self.spec.validation
            self._keep_apart()
        elif isinstance(self.spec.validation, float):
            share = _share(self.spec.validation, "data.validation")
            rows, self.validation = hold_back(rows, share, seed=self.seed, key="data.validation")
            self.validation_from = f"{share:.0%} of the training rows, held back before training"
        return rows, self.validation, self.test

    def _file(self, path: str, role: str) -> list[Row]:
        """Reads held-out rows as the training rows are read, when all of those are read alike."""
        like = source_specs(self.spec)
        same = all((other.format, other.columns) == (like[0].format, like[0].columns) for other in like)
        kind, columns = (like[0].format, like[0].columns) if same else (self.spec.format, self.spec.columns)
        rows, described = _read(SourceSpec(path=path, format=kind, columns=columns), self.spec, role)
        self.sources.append(described)
        kept, empty = without_empty(rows, self.spec)
        if empty:
            self.notes.append(f"{_left_out(len(empty), path)}: empty, the first at {empty[0].source}")
        if not kept:
            raise InputError("every row is empty", where=path, fix=f"name another file in data.{role}")
        return kept

    def _keep_apart(self) -> None:
        """The rows that choose the checkpoint must not be those that judge it."""
        if self.spec.overlap == "keep":
            return
        judged = {row.prompt_key: row for row in self.test}
        shared = [row for row in self.validation if row.prompt_key in judged]
        errors = RowErrors()
        for row in shared:
            errors.add(row.source, f"the same prompt as {judged[row.prompt_key].source}, which is a test row")
        if self.spec.overlap == "error":
            errors.raise_any("remove them from validation, or set data.overlap: drop or keep")
        self.validation = [row for row in self.validation if row.prompt_key not in judged]
        if not self.validation:
            raise InputError(
                "every validation row also stands in the test rows",
                where="data.validation",
                fix="name other rows, or a fraction such as 0.1",
            )
        if shared:
            self.notes.append(f"{_left_out(len(shared), 'validation')}: the test has the same prompts")


def _share(value: float, key: str) -> float:
    if not 0 < value < 1:
        raise InputError(f"{value} is not a fraction between 0 and 1", where=key, fix="use 0.1 for a tenth, or a path")
    return value


def _some(rows: list[T]) -> list[T]:
    if not rows:
        raise InputError(
            "no training row is left", where="data.train", fix="see data.overlong, data.empty, data.overlap"
        )
    return rows


def _left_out(count: int, where: str) -> str:
    return f"1 row of {where} was left out" if count == 1 else f"{count} rows of {where} were left out"


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


def _fitting(items: list[Rendered], limit: int, spec: DataSpec, *, role: str, notes: list[str]) -> list[Rendered]:
    """Answers for judging are never cut: what the model cannot hold is left out or an error, as for training rows."""
    errors, kept = RowErrors(), []
    for item in items:
        if len(item.example) <= limit:
            kept.append(item)
        elif spec.overlong == "truncate" and not item.row.messages and (shorter := truncated(item, limit)):
            kept.append(shorter)
        else:
            errors.add(item.row.source, f"{len(item.example)} tokens do not fit into the model's {limit} positions")
    if spec.overlong == "error":
        errors.raise_any(f"shorten these {role} rows, or leave them out with data.overlong: drop")
    if items and not kept:
        raise InputError(
            f"no {role} row fits into the model's {limit} positions", where=f"data.{role}", fix="name shorter rows"
        )
    if errors.count:
        notes.append(f"{_left_out(errors.count, role)}: too long for the model, the first at {errors.first}")
    return kept
