"""From a recipe's `data` section to examples: read, check, split, render; everything lost is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tunesmith.base import InputError, Progress
from tunesmith.data.blocks import Blocks
from tunesmith.data.check import Finding
from tunesmith.data.clean import (
    Losses,
    Lost,
    refuse_unrendered,
    with_targets,
    within_length,
    without_duplicates,
    without_empty,
    without_equal_pairs,
    without_overlap,
)
from tunesmith.data.held import Held, HeldOut, left_out
from tunesmith.data.ingest import SourceRows, ingest
from tunesmith.data.inspection import inspect, inspecting_aside
from tunesmith.data.mix import RowOrder, mixture_weights, places_in_an_epoch
from tunesmith.data.record import RowErrors
from tunesmith.data.render import RowRenderer
from tunesmith.data.row import SAME_ANSWERS
from tunesmith.data.row_file import RowFile
from tunesmith.data.sources import readings, source_specs
from tunesmith.data.spec import DataSpec, SourceSpec
from tunesmith.data.stored import RenderedRows, Stored
from tunesmith.data.token_file import tokens_of
from tunesmith.data.truncate import truncated

BLOCK = 2048
"""Tokens of a block when nothing else is said: the context in which Pythia, OLMo and SmolLM2 were pretrained first."""


@dataclass(frozen=True)
class Prepared:
    """All rows of a job, ready for a model.

    Attributes:
        train, validation, test: rendered rows; `Blocks` where rows are documents.
        order: the stream in which the training rows are visited.
        max_length: the length limit that was applied, in tokens.
        stop_ids: tokens that end an answer.
        lost: training rows that are not used.
        sources: path, format, rows and hash of every file.
        mixture: for each training source its rows and its places in an epoch, when these are not the same.
        test_from, validation_from: where those rows came from, in words.
        notes: what a user should know.
        findings: what the checks found in rows that are used all the same.
    """

    train: RenderedRows
    validation: RenderedRows
    test: RenderedRows
    order: RowOrder
    max_length: int
    stop_ids: set[int]
    lost: list[Lost]
    sources: list[dict[str, Any]]
    mixture: list[dict[str, Any]]
    test_from: str
    validation_from: str
    template: str
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def manifest(self) -> dict[str, Any]:
        """What `data.json` and the report say about the data."""
        return {
            "rows_used": len(np.unique(self.train.numbers)),
            "rows_lost": sum(lost.rows for lost in self.lost),
            "tokens": int(self.train.lengths.sum()),
            "target_tokens_used": int(self.train.targets.sum()),
            "target_tokens_lost": sum(lost.target_tokens for lost in self.lost),
            "max_length": self.max_length,
            "blocks": {"count": len(self.train), "full": self.train.fill} if isinstance(self.train, Blocks) else None,
            "template": self.template,
            "lost": [vars(lost) for lost in self.lost],
            "sources": self.sources,
            "mixture": self.mixture,
            "validation": {"rows": len(self.validation), "from": self.validation_from} if self.validation else None,
            "test": {"rows": len(self.test), "from": self.test_from} if self.test else None,
            "notes": self.notes,
            "findings": [finding.as_json() for finding in self.findings],
        }


def prepare(
    spec: DataSpec,
    renderer: RowRenderer,
    *,
    model_limit: int,
    seed: int,
    wants_test: bool,
    progress: Progress,
    alone: bool = False,
) -> Prepared:
    """Does everything between files and examples.

    Args:
        model_limit: positions that the model has, in tokens.
        wants_test: whether rows are held back for a verdict when no test file is named.
        alone: start no process that works beside this one, and leave the checks to one that ends before anything else;
            slower on large files.

    Raises:
        InputError: for anything wrong with the data or its settings.
    """
    tasks = source_specs(spec)
    rows, sources = _read(spec, tasks, renderer, progress)
    lost, notes = Losses(), [note for source in sources for note in source.notes]
    drawn_by = seed if spec.split_seed is None else spec.split_seed
    train, held = _parted(rows, sources, Held(spec, drawn_by, wants_test, renderer.answers_optional), lost)
    splits = {"train": train, "validation": held.validation, "test": held.test}
    with inspecting_aside(rows, splits if spec.checks else {}, spec.benchmarks, progress, first=alone):
        stored = Stored(rows, tokens_of(rows, renderer, progress))
    train, equal = without_equal_pairs(train, stored)
    lost.add(SAME_ANSWERS, equal)
    refuse_unrendered(train, stored)
    longest = BLOCK if renderer.in_blocks else int(stored.reach(train).max(initial=0))
    limit = _limit(spec, longest, model_limit)
    if renderer.in_blocks:
        parts, origins = _in_blocks(splits, stored, limit, notes)
    else:
        train = with_targets(_some(within_length(train, limit, limit == model_limit, stored, spec, lost)), stored, lost)
        parts, origins = _row_by_row({**splits, "train": train}, stored, spec, (limit, model_limit), held.notes)
    notes += held.notes
    notes += [f"{note} ({count} times)" if count > 1 else note for note, count in Counter(renderer.notes).items()]
    findings = inspect(rows, splits, spec.benchmarks, progress).findings if spec.checks else []
    notes += [f"{finding.title}: {finding.fix}" for finding in findings if finding.level != "note"]
    left = np.bincount(origins, minlength=len(tasks)).tolist()
    places = places_in_an_epoch(spec, tasks, left)
    return Prepared(
        **parts,
        order=RowOrder(torch.from_numpy(origins), places, seed),
        max_length=limit,
        stop_ids=set(renderer.stop_ids),
        lost=lost.summary(stored),
        sources=[source.as_json() for source in sources],
        mixture=_mixture(tasks, left, places),
        test_from=held.test_from,
        validation_from=held.validation_from,
        template=renderer.name,
        notes=notes,
        findings=findings,
    )


def _read(
    spec: DataSpec, tasks: Sequence[SourceSpec], renderer: RowRenderer, progress: Progress
) -> tuple[RowFile, list[SourceRows]]:
    """All rows of all files; settings that cannot be met are refused before any file is opened."""
    mixture_weights(spec, tasks[:-1] if spec.replay else tasks, [1] * len(tasks))
    ingested = ingest(readings(spec), progress, refused=renderer.unused)
    ingested.refuse_wrong_rows()
    return ingested.rows, ingested.sources


def _mixture(tasks: Sequence[SourceSpec], rows: Sequence[int], places: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"path": task.path, "rows": count, "places": place}
        for task, count, place in zip(tasks, rows, places, strict=False)
    ]


def _parted(rows: RowFile, sources: list[SourceRows], holding: Held, lost: Losses) -> tuple[np.ndarray, HeldOut]:
    """The rows that are trained on, and those that are held out; no row is both."""
    spec = holding.spec
    roles = np.array([source.role for source in sources])[rows.index["source"]]
    numbers = np.nonzero((roles == "train") | (roles == "replay"))[0]
    numbers, empty = without_empty(
        without_duplicates(numbers, rows, spec, lost), rows, spec, answers_optional=holding.answers_optional
    )
    lost.add("empty", empty)
    files = {role: np.nonzero(roles == role)[0] for role in ("validation", "test")}
    may_be_held = roles[numbers] == "train"
    kept, held = holding.split(_some(numbers[may_be_held]), files, rows)
    train = np.sort(np.concatenate([kept, numbers[~may_be_held]]))
    train = without_overlap(train, np.concatenate([held.validation, held.test]), rows, spec, lost)
    return train, held


def _row_by_row(
    splits: dict[str, np.ndarray], stored: Stored, spec: DataSpec, limits: tuple[int, int], notes: list[str]
) -> tuple[dict[str, RenderedRows], np.ndarray]:
    """The rows of each split, and the source of each that is trained on.

    Args:
        limits: the most tokens of a row that is trained on, and of any row.
    """
    limit, model_limit = limits
    parts = {
        name: _fitting(splits[name], model_limit, stored, spec, role=name, notes=notes)
        for name in ("validation", "test")
    }
    train = RenderedRows(stored, splits["train"], limit if spec.overlong == "truncate" else None)
    return {"train": train, **parts}, stored.rows.index["source"][splits["train"]].astype(np.int64)


def _in_blocks(
    splits: dict[str, np.ndarray], stored: Stored, block: int, notes: list[str]
) -> tuple[dict[str, RenderedRows], np.ndarray]:
    """Documents cut into pieces of a block: those to train on laid together, the held-out ones each for itself.

    Returns:
        The rows of each split, and the source of each block.
    """
    if block < 2:
        raise InputError("a block of one token has no target", where="data.max_length", fix="use 2 or more")
    for numbers in splits.values():
        refuse_unrendered(numbers, stored)
    documents = {name: RenderedRows(stored, numbers) for name, numbers in splits.items()}
    origins = stored.rows.index["source"][_some(splits["train"])].astype(np.int64)
    train, sources = Blocks.filled(documents["train"], origins, block)
    notes.append(
        f"{len(splits['train']):,} documents lie in {len(train):,} blocks of at most {block:,} tokens, which are "
        f"{train.fill:.1%} full; every token is trained on once an epoch"
    )
    held = {name: Blocks.one_a_document(documents[name], block) for name in ("validation", "test")}
    return {"train": train, **held}, sources


def _limit(spec: DataSpec, longest: int, model_limit: int) -> int:
    limit = min(longest, model_limit) if spec.max_length == "auto" else spec.max_length
    if limit > model_limit:
        raise InputError(
            f"{limit} tokens are more than the model's {model_limit} positions",
            where="data.max_length",
            fix=f"use at most {model_limit}",
        )
    return limit


def _some(numbers: np.ndarray) -> np.ndarray:
    if not len(numbers):
        raise InputError(
            "no training row is left", where="data.train", fix="see data.overlong, data.empty, data.overlap"
        )
    return numbers


def _fitting(
    numbers: np.ndarray, limit: int, stored: Stored, spec: DataSpec, *, role: str, notes: list[str]
) -> RenderedRows:
    """Answers for judging are never cut: what the model cannot hold is left out or an error, as for training rows."""
    numbers, equal = without_equal_pairs(numbers, stored)
    if len(equal):
        notes.append(f"{left_out(len(equal), role)}: {SAME_ANSWERS}, the first at {stored.rows.source(equal[0])}")
    refuse_unrendered(numbers, stored)
    errors, fits = RowErrors(), stored.reach(numbers) <= limit
    cut = False
    for at in np.nonzero(~fits)[0]:
        item = stored.rendered(numbers[at])
        if spec.overlong == "truncate" and not item.row.messages and truncated(item, limit) is not None:
            fits[at] = cut = True
        else:
            errors.add(item.row.source, f"{item.example.reach} tokens do not fit into the model's {limit} positions")
    if spec.overlong == "error":
        errors.raise_any(f"shorten these {role} rows, or leave them out with data.overlong: drop")
    if len(numbers) and not fits.any():
        raise InputError(
            f"no {role} row fits into the model's {limit} positions", where=f"data.{role}", fix="name shorter rows"
        )
    if errors.count:
        notes.append(f"{left_out(errors.count, role)}: too long for the model, the first at {errors.first}")
    return RenderedRows(stored, numbers[fits], limit if cut else None)
