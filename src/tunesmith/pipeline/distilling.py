"""What a teacher says of the rows, once and kept on disk: answers, and what it finds likely at every target."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.base import InputError, Progress, silent
from tunesmith.batch import Example, pack
from tunesmith.data.cache import cached
from tunesmith.data.record import BadRow
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.row import Row
from tunesmith.data.row_file import RowFile, RowFileWriter
from tunesmith.data.stored import RenderedRows, Stored
from tunesmith.data.token_file import tokens_of
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.files import read_json, write_json
from tunesmith.models.forward import packing_obstacle
from tunesmith.models.measure import position_limit
from tunesmith.objectives import Distill
from tunesmith.pipeline.by_target import Reading, identity_of, kept_by_target
from tunesmith.pipeline.lineage import teacher_files
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.teacher import Teacher
from tunesmith.train.batches import StepBatches
from tunesmith.train.loop import MicroBatches
from tunesmith.train.on_policy import Answering, OnPolicyBatches
from tunesmith.train.randomness import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = "kept.json"
LEAST_ANSWER, LONGER = 16, 1.5
"""Tokens that a sampled answer may have at least, and how much longer than the longest of the rows'."""


def with_teacher(planned: Planned, progress: Progress) -> Planned:
    """Rows that carry what the teacher says; it is in memory only while it is asked something that is not on disk yet.

    Raises:
        InputError: when the teacher cannot be loaded, or rows cannot be read by it.
    """
    objective, prepared = planned.objective, planned.prepared
    if planned.teacher is None or not isinstance(objective, Distill) or prepared is None:
        return planned
    lesson = Lesson(planned, objective, planned.teacher, progress)
    parts = {name: rows for name in ("train", "validation") if len(rows := getattr(prepared, name))}
    if objective.answers == "teacher":
        parts = {name: lesson.answered(rows) for name, rows in parts.items()}
    if objective.weight > 0:
        asked = [name for name in parts if name != "train" or objective.on_policy < 1]
        parts |= {name: lesson.scored(parts[name]) for name in asked}
    lesson.end()
    notes = [*planned.plan.notes, *(note for note in lesson.notes if note not in planned.plan.notes)]
    planned = planned.with_plan(planned.plan.model_copy(update={"notes": notes}))
    return replace(planned, prepared=replace(prepared, **parts))


def with_own_answers(planned: Planned, student: nn.Module, written: StepBatches) -> MicroBatches:
    """The batches of a job, in a share of which the student answers itself, where the objective says so.

    The teacher stays in memory with what is returned.
    """
    objective, teacher = planned.objective, planned.teacher
    if teacher is None or not isinstance(objective, Distill) or not objective.on_policy:
        return written
    lesson = Lesson(planned, objective, teacher, silent)
    with seeded(0):  # a resumed run loads it too, behind the random states of its checkpoint
        model = lesson.model()
    layout: Any = "padded" if packing_obstacle(model) else "packed"
    device = next(model.parameters()).device

    def says(rows: Sequence[Example]) -> dict[str, Tensor]:
        return objective.says(model, pack(rows, layout).to(device), lesson.student_rows)

    temperature = 1.0 if objective.sample_temperature == "auto" else objective.sample_temperature
    how = Answering(
        objective.on_policy,
        Sampling(longest_answer(planned), temperature),
        frozenset(lesson.renderer.stop_ids),
        planned.recipe.seed,
    )

    def prompt(row: Rendered) -> Sequence[int]:
        return teacher.reads(row, lesson.renderer).prompt_ids

    return OnPolicyBatches(written, student, how, says=says, prompt=prompt)


def longest_answer(planned: Planned) -> int:
    """Tokens that an answer of teacher or student may have.

    Raises:
        InputError: when the longest prompt leaves no room for one.
    """
    objective, prepared, teacher = planned.objective, planned.prepared, planned.teacher
    assert isinstance(objective, Distill) and prepared is not None and teacher is not None
    assert isinstance(planned.renderer, Renderer)
    train, prompts = prepared.train, [_prompt_lengths(rows) for rows in (prepared.train, prepared.validation)]
    longest = objective.max_new_tokens
    if longest == "auto":
        longest = max(LEAST_ANSWER, math.ceil(LONGER * int((train.lengths - prompts[0]).max())))
    first = train[0]
    before = len(teacher.reads(first, planned.renderer).prompt_ids) - len(first.prompt_ids)
    positions = min(teacher.positions - before, position_limit(planned.config))
    room = positions - int(np.concatenate(prompts).max())
    if room < 1:
        raise InputError(
            "the longest prompt leaves no room for an answer", where="data.max_length", fix="leave long prompts out"
        )
    return min(longest, room)


def _prompt_lengths(rows: RenderedRows) -> np.ndarray:
    return rows.stored.tokens.index["prompt"][rows.numbers].astype(np.int64)


@dataclass
class Lesson:
    """What a teacher is asked, and what it is asked with.

    Attributes:
        notes: what a user should know.
    """

    planned: Planned
    objective: Distill
    teacher: Teacher
    progress: Progress

    def __post_init__(self) -> None:
        assert isinstance(self.planned.renderer, Renderer) and self.planned.tokenizer is not None
        self.renderer, self.tokenizer = self.planned.renderer, self.planned.tokenizer
        self.notes: list[str] = []
        self._model: PreTrainedModel | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Who teaches and what it reads, as JSON values."""
        quantized = None if self.teacher.quantized is None else self.teacher.quantized.name
        return {
            "files": teacher_files(self.teacher, self.progress),
            "held": [self.planned.plan.dtype, quantized],
            "prompt": self.teacher.prompt,
            "text": self.renderer.identity(),
        }

    def model(self) -> nn.Module:
        if self._model is None:
            self._model = self.teacher.load(self.tokenizer, self.planned.plan, self.progress)
        return self._model

    def end(self) -> None:
        """Lets go of the model."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def student_rows(self) -> int:
        return int(self.planned.config.get_text_config().vocab_size)

    def scored(self, rows: RenderedRows) -> RenderedRows:
        """The rows with what the teacher finds likely at every target."""
        objective, student_rows = self.objective, self.student_rows
        asked = {"top_k": objective.top_k, "temperature": objective.temperature, "student_rows": student_rows}
        reading = Reading(
            self.model,
            lambda model, batch: objective.says(model, batch, student_rows),
            lambda model: packing_obstacle(model) is None,
            "asking the teacher",
            self.progress,
            lambda at, item: self.teacher.reads(item, self.renderer).example,
        )
        return kept_by_target({"teacher": {**self.identity, **asked}}, rows, reading)

    def answered(self, rows: RenderedRows) -> RenderedRows:
        """The rows with the teacher's answers in place of their own last ones.

        Rows keep their own where the teacher said nothing, did not end, or wrote what cannot be rendered.
        """
        temperature = self.objective.sample_temperature
        temperature = 0.0 if temperature == "auto" else temperature
        asked = {
            "temperature": temperature,
            "seed": self.planned.recipe.seed if temperature else None,
            "longest": longest_answer(self.planned),
        }
        sampling = Sampling(asked["longest"], temperature)
        directory = cached(
            {"answers": {**self.identity, **asked}, **identity_of(rows)},
            lambda directory: self._write(directory, rows, sampling),
        )
        kept: dict[str, int] = read_json(directory / _KEPT)
        self.notes += [
            f"{count} of {len(rows)} rows keep their own answer, because the teacher's {why}"
            for why, count in kept.items()
        ]
        file = RowFile(directory)
        stored = Stored(file, tokens_of(file, self.renderer, self.progress))
        return RenderedRows(stored, np.arange(len(file)), position_limit(self.planned.config))

    def _write(self, directory: Path, rows: RenderedRows, sampling: Sampling) -> None:
        items = [self.teacher.reads(item, self.renderer) for item in rows]
        with seeded(self.planned.recipe.seed):
            said = generate(
                self.model(),
                [item.prompt_ids for item in items],
                sampling,
                stop_ids=self.renderer.stop_ids,
                batch_size=16,
                progress=self.progress,
            )
        writer, kept = RowFileWriter(directory), Counter[str]()
        sources = rows.stored.rows.column("source", rows.numbers)
        for at, answer in enumerate(said):
            row = self._answered(rows[at], answer, kept)
            writer.add(row, int(sources[at]))
        writer.close()
        write_json(directory / _KEPT, kept)

    def _answered(self, item: Rendered, answer: Generation, kept: Counter[str]) -> Row:
        text = str(self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)).strip()
        row = item.row
        if answer.finish_reason == "length" or not text:
            kept["does not end within objective.max_new_tokens" if text else "is empty"] += 1
            return row
        new = replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": text}), references=(text,))
        try:
            self.renderer.render(new)
        except BadRow:
            kept["cannot be rendered"] += 1
            return row
        return new
