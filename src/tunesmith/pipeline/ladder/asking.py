"""Asks a model, and keeps every answer on disk: what was answered once is never asked again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunesmith.base import Interrupted, Progress
from tunesmith.data.row import Row
from tunesmith.engine.generate import Sampling, generate
from tunesmith.pipeline.by_target import weights_sha256
from tunesmith.pipeline.ladder.ways import Way
from tunesmith.pipeline.loaded import Speaker
from tunesmith.pipeline.stopping import Stopping


class AnswerFile:
    """JSON lines, each under a key; a line that a killed process left half-written is passed over.

    Args:
        path: is made when the first line is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    self._found[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
            with open(path, "rb+") as file:
                file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, entries: dict[str, Any]) -> None:
        """Appends entries; they are on the disk when this returns."""
        self._found |= entries
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            for key, value in entries.items():
                file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Said:
    """What a model said to one prompt."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Answered:
    """One row, asked in one way.

    Attributes:
        answer: None where the prompt did not fit, or no answer was found in what was said.
        said: all of what was said to the last prompt.
        prompt_tokens, completion_tokens: over all prompts of the row.
        fits: whether every prompt and the longest answer to it fit into the model's positions.
        finish_reason: of the last prompt; `length` where the limit ended it.
    """

    answer: str | None
    said: str
    prompt_tokens: int
    completion_tokens: int
    fits: bool
    finish_reason: str


@dataclass(frozen=True)
class Store:
    """Where answers and times are kept."""

    answers: AnswerFile
    seconds: AnswerFile

    @classmethod
    def within(cls, directory: Path) -> Store:
        return cls(AnswerFile(directory / "answers.jsonl"), AnswerFile(directory / "seconds.jsonl"))


class Asker:
    """A model that is asked.

    Args:
        positions: of the model.
        batch_size: prompts at a time; a kill loses at most the answers to so many.
    """

    def __init__(self, speaker: Speaker, positions: int, batch_size: int, store: Store, progress: Progress) -> None:
        self.speaker, self.store = speaker, store
        self._positions, self._batch_size, self._progress = positions, batch_size, progress
        model: Any = speaker.model
        self._identity = [weights_sha256(model, model.config), sorted(speaker.renderer.stop_ids)]

    def answers(self, label: str, way: Way, rows: Sequence[Row]) -> list[Answered]:
        """Every row's answer, greedy.

        Raises:
            Interrupted: after Ctrl-C, between two batches.
        """
        previous, fits = [""] * len(rows), [True] * len(rows)
        read, written, ended = [0] * len(rows), [0] * len(rows), ["stop"] * len(rows)
        for number, stage in enumerate(way.stages, 1):
            name = label if len(way.stages) == 1 else f"{label}, prompt {number} of {len(way.stages)}"
            prompts: dict[int, list[int]] = {}
            for at, row in enumerate(rows):
                if not fits[at]:
                    continue
                self._progress(f"{name}: writing prompts", at, len(rows))
                ids = self.speaker.renderer.prompt_ids(stage.ask(row, previous[at]), row.tools)
                read[at] += len(ids)
                fits[at] = len(ids) + stage.max_new_tokens <= self._positions
                if fits[at]:
                    prompts[at] = ids
            said = self._said(name, list(prompts.values()), stage.max_new_tokens)
            for at, one in zip(prompts, said, strict=True):
                previous[at], ended[at] = one.text, one.finish_reason
                written[at] += one.tokens
        return [
            Answered(way.read(text) if ok else None, text if ok else "", asked, answered, ok, end)
            for text, asked, answered, ok, end in zip(previous, read, written, fits, ended, strict=True)
        ]

    def seconds(self, label: str, way: Way, rows: Sequence[Row]) -> list[float]:
        """How long each row takes by itself: making its prompts, searches included, and answering them."""
        self._progress(f"{label}: one at a time", 0, len(rows))
        found: list[float] = []
        for at, row in enumerate(rows):
            key = self._key([label, str(row.source), row.prompt_key, *(stage.max_new_tokens for stage in way.stages)])
            if key not in self.store.seconds:
                if not found:
                    self._timed(way, row)  # once without a watch: the first pass of a shape sets things up
                self.store.seconds.add({key: self._timed(way, row)})
            found.append(self.store.seconds[key])
            self._progress(f"{label}: one at a time", at + 1, len(rows))
        return found

    def _timed(self, way: Way, row: Row) -> float:
        start, previous = time.perf_counter(), ""
        for stage in way.stages:
            ids = self.speaker.renderer.prompt_ids(stage.ask(row, previous), row.tools)
            previous = self._generated([ids], stage.max_new_tokens)[0].text
        return time.perf_counter() - start

    def _said(self, label: str, prompts: Sequence[list[int]], limit: int) -> list[Said]:
        keys = [self._key([ids, limit]) for ids in prompts]
        kept = self.store.answers
        # Prompts that begin alike stand together, for the generator reads what a batch shares once.
        missing = sorted(
            {key: at for at, key in enumerate(keys) if key not in kept}.values(), key=lambda at: prompts[at]
        )
        self._progress(label, len(prompts) - len(missing), len(prompts))
        with Stopping() as stopping:
            stopping.graceful = True
            for start in range(0, len(missing), self._batch_size):
                chosen = missing[start : start + self._batch_size]
                said = self._generated([prompts[at] for at in chosen], limit)
                kept.add({keys[at]: asdict(one) for at, one in zip(chosen, said, strict=True)})
                self._progress(label, len(prompts) - len(missing) + start + len(chosen), len(prompts))
                if stopping.asked():
                    raise Interrupted("stopped; every answer so far is kept", fix="give the same command again")
        return [Said(**kept[key]) for key in keys]

    def _generated(self, prompts: Sequence[list[int]], limit: int) -> list[Said]:
        speaker = self.speaker
        found = generate(
            speaker.model,
            prompts,
            Sampling(limit),
            stop_ids=speaker.renderer.stop_ids,
            batch_size=self._batch_size,
            progress=lambda label, done, total: None,
        )
        return [Said(speaker.text(one.token_ids), len(one.token_ids), one.finish_reason) for one in found]

    def _key(self, what: Any) -> str:
        return sha256(json.dumps([self._identity, what]).encode()).hexdigest()[:32]
