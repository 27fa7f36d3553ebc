"""A poll on disk: two systems' answers to the same rows, written once, and the votes on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from filelock import FileLock

from tunesmith.base import InputError, Progress, nearest, silent
from tunesmith.data.ingest import ingest
from tunesmith.data.row import Row
from tunesmith.data.sources import readings
from tunesmith.data.spec import DataSpec
from tunesmith.engine.generate import Sampling, generate
from tunesmith.evaluation.answers import turns_text
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.model_judge import ORDERS, ask, judge_results
from tunesmith.evaluation.votes import CHOICES, Choice, Pair, Vote, left_of, standing, vote_results
from tunesmith.files import append_json, file_sha256, read_json, read_json_lines, write_json, write_lines
from tunesmith.models.load import read_config
from tunesmith.models.measure import position_limit
from tunesmith.pipeline.loaded import base_of, load_speaker, read_as_trained
from tunesmith.pipeline.locating import locate

POLL, PAIRS, VOTES, VERDICTS = "poll.json", "pairs.jsonl", "votes.jsonl", "verdicts.jsonl"
BASE = "base"
ANSWERS = ("answer", "text", "completion", "response", "output", "prediction")
"""Columns of a file of answers, the first that is there."""
AT_ONCE = 16
CONFIDENCE = 0.95
Side = Literal["a", "b"]


@dataclass(frozen=True)
class Asked:
    """What a poll is about; the same command finds the same poll again.

    Attributes:
        a, b: runs, adapters, models, files of answers, or `base` for the base of the other.
        on: rows with prompts.
        rows: at most this many.
        seed: of the sides.
        max_new_tokens: of an answer that is generated.
    """

    a: str
    b: str
    on: str
    rows: int
    seed: int
    max_new_tokens: int

    def directory(self) -> Path:
        """Where such a poll is kept when nothing else is said."""
        names = [re.sub(r"[^\w.-]+", "-", Path(name).stem or name).strip("-") for name in (self.a, self.b)]
        return Path("votes") / "-vs-".join(names)


@dataclass(frozen=True)
class Poll:
    """A poll whose answers are written."""

    path: Path
    asked: Asked
    pairs: list[Pair]

    @staticmethod
    def open(path: Path) -> Poll:
        """An existing poll. Raises InputError when there is none, or its files are damaged."""
        if not (path / POLL).is_file():
            raise InputError("there is no poll here", where=path, fix="tunesmith vote A B --on rows.jsonl makes one")
        try:
            asked = Asked(**read_json(path / POLL)["asked"])
            pairs = [Pair(**line) for line in read_json_lines(path / PAIRS)]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        if not pairs:
            fix = f"run the command that made it again: tunesmith vote {asked.a} {asked.b} --on {asked.on} --out {path}"
            raise InputError("the answers of this poll are not all written yet", where=path, fix=fix)
        return Poll(path, asked, pairs)

    def votes(self) -> list[Vote]:
        """The votes that hold, of all raters."""
        return standing(self._lines(VOTES))

    def left(self, rater: str, row: int) -> Side:
        return left_of(self.asked.seed, rater, row)

    def cast(self, rater: str, row: int, choice: Choice) -> None:
        """Keeps one vote; it is on the disk when this returns."""
        append_json(self.path / VOTES, Vote(row, rater, choice, self.left(rater, row)).as_json())

    def take_back(self, rater: str, row: int) -> None:
        append_json(self.path / VOTES, {"row": row, "rater": rater, "undo": True})

    def open_rows(self, rater: str) -> list[Pair]:
        """The pairs that a rater has not voted on, in the order of the rows."""
        voted = {vote.row for vote in self.votes() if vote.rater == rater}
        return [pair for pair in self.pairs if not pair.same and pair.row not in voted]

    def judge(self, endpoint: Endpoint, progress: Progress) -> None:
        """Lets a model judge every pair in both orders; what it has judged before is not asked again.

        Raises:
            InputError, TunesmithError: as `Endpoint.ask`; every verdict so far is kept.
        """
        with FileLock(self.path / "judging.lock"):
            lines = self._lines(VERDICTS)
            done = {(line["row"], line["first"]) for line in lines if line["model"] == endpoint.model}
            todo: list[tuple[Pair, Side]] = [(pair, first) for pair in self.pairs if not pair.same for first in ORDERS]
            for at, (pair, first) in enumerate(todo):
                progress("judging", at, len(todo))
                if (pair.row, first) not in done:
                    append_json(self.path / VERDICTS, ask(endpoint, pair, first).as_json())
            progress("judging", len(todo), len(todo))

    def results(self) -> dict[str, Any]:
        """What votes and verdicts come to."""
        votes = self.votes()
        judges = judge_results(self.pairs, self._lines(VERDICTS), votes, CONFIDENCE)
        found = vote_results(self.pairs, votes, CONFIDENCE)
        return {"poll": str(self.path), **asdict(self.asked), "pairs": len(self.pairs), **found, "judges": judges}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            return read_json_lines(self.path / name)
        except ValueError as error:
            raise _damaged(self.path / name, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"this poll is damaged: {error}", where=path, fix="restore it from a copy, or name another: --out"
    )


def open_poll(asked: Asked, path: Path, progress: Progress) -> Poll:
    """The poll in a directory, made there if need be; answers that an interrupted command has written are kept.

    Raises:
        InputError: when the directory holds another poll, the systems cannot be compared, or a file is wrong.
    """
    _refuse_wrong_sides(asked)
    if (path / POLL).is_file():
        stored = read_json(path / POLL)
        differing = [name for name, value in asdict(asked).items() if stored["asked"].get(name) != value]
        if "on" in differing:
            _rows(DataSpec(train=asked.on), 1, progress)  # a file that is not there is no other poll
        if differing or stored["on_sha256"] != _hash(asked.on):
            what = (
                f"{', '.join(differing)} differ{'s' * (len(differing) == 1)}"
                if differing
                else f"{asked.on} has changed since"
            )
            raise InputError(f"another poll is kept here: {what}", where=path, fix="name another directory: --out DIR")
    else:
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise InputError("this is not an empty directory", where=path, fix="name another one: --out DIR")
        digest = _hash(asked.on)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / POLL, {"asked": asdict(asked), "on_sha256": digest})
    if not (path / PAIRS).is_file():
        try:
            with FileLock(path / "answering.lock"):
                pairs = _answered(asked, path, progress)
                write_lines(path / PAIRS, (json.dumps(pair.as_json(), ensure_ascii=False) + "\n" for pair in pairs))
        except InputError:
            if not any(path.glob("answers.*")):
                shutil.rmtree(path)
            raise
    return Poll.open(path)


def _hash(on: str) -> str | None:
    path = Path(on).expanduser()
    return file_sha256(path) if path.is_file() else None


def _refuse_wrong_sides(asked: Asked) -> None:
    if asked.a == asked.b:
        raise InputError("A and B are the same", where="vote", fix="name two systems, such as a run and base")
    other = {asked.a: asked.b, asked.b: asked.a}.get(BASE)
    if other is not None and is_file_of_answers(other):
        raise InputError("a file of answers has no base", where="vote", fix="name a run beside base")
    if other is not None:
        location = locate(other)
        if location.recipe is None and location.adapter is None:
            raise InputError("a model by itself has no base", where=other, fix="name a run or an adapter beside base")


def is_file_of_answers(name: str) -> bool:
    return Path(name).expanduser().suffix in (".jsonl", ".json") and Path(name).expanduser().is_file()


def _answered(asked: Asked, path: Path, progress: Progress) -> list[Pair]:
    sides = [_answers(asked, side, path, progress) for side in ("a", "b")]
    rows = sides[0][0] or sides[1][0] or _rows(DataSpec(train=asked.on), asked.rows, progress)
    for (_, answers), name in zip(sides, (asked.a, asked.b), strict=True):
        if len(answers) < len(rows):
            raise InputError(
                f"{len(answers)} answers, and {asked.on} has {len(rows)} rows",
                where=name,
                fix="bring one answer a row, in the same order, or fewer --rows",
            )
    return [
        Pair(at + 1, str(row.source), turns_text(row.messages[:-1]), _references(row), sides[0][1][at], sides[1][1][at])
        for at, row in enumerate(rows)
    ]


def _references(row: Row) -> list[str]:
    return [text for text in row.references if text.strip()]


def _rows(data: DataSpec, most: int, progress: Progress) -> list[Row]:
    """The first rows of a file; each must hold a prompt."""
    found = ingest(readings(data), progress)
    found.refuse_wrong_rows()
    rows = [row for _, row in found.rows.read(range(min(most, len(found.rows))))]
    for row in rows:
        if len(row.messages) < 2:
            raise InputError("this row has no prompt to answer", where=str(row.source), fix="name rows with prompts")
    return rows


def _answers(asked: Asked, side: Side, path: Path, progress: Progress) -> tuple[list[Row], list[str]]:
    """The rows as a model reads them (none for a file of answers), and an answer to each."""
    name, other = (asked.a, asked.b) if side == "a" else (asked.b, asked.a)
    if is_file_of_answers(name):
        return [], _answers_of_file(Path(name).expanduser())[: asked.rows]
    return _generated(asked, name, other, path / f"answers.{side}.jsonl", progress)


def _answers_of_file(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"no JSON: {error.msg}", where=where, fix='one answer a line: {"answer": "…"}') from error
        if isinstance(values, str):
            found.append(values)
            continue
        given = next((values[key] for key in ANSWERS if key in values), None) if isinstance(values, dict) else None
        if not isinstance(given, str):
            raise InputError(
                "this line holds no answer", where=where, fix=f"name its column one of {', '.join(ANSWERS)}"
            )
        found.append(given)
    return found


def _generated(asked: Asked, name: str, other: str, kept: Path, progress: Progress) -> tuple[list[Row], list[str]]:
    """Answers of a model, greedily, each written as it comes."""
    if name == BASE:
        location = locate(other, progress)
        speaker = load_speaker(base_of(location), progress=progress, like=location)
    else:
        speaker = load_speaker(name, progress=progress)
    rows = _rows(read_as_trained(speaker, DataSpec(train=asked.on)), asked.rows, progress)
    limit = position_limit(read_config(speaker.location.base))
    prompts = [speaker.renderer.prompt_ids(row.messages[:-1], row.tools) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) >= limit:
            what = f"this prompt has {len(prompt)} tokens, and {name} {limit} positions"
            raise InputError(what, where=str(row.source), fix="shorten it, or leave it out")
    answers = [line["answer"] for line in read_json_lines(kept)]
    for start in range(len(answers), len(rows), AT_ONCE):
        progress(f"answers of {name}", start, len(rows))
        sampling = Sampling(min(asked.max_new_tokens, limit - max(map(len, prompts[start : start + AT_ONCE]))))
        chunk, ends = prompts[start : start + AT_ONCE], speaker.renderer.stop_ids
        found = generate(speaker.model, chunk, sampling, stop_ids=ends, batch_size=AT_ONCE, progress=silent)
        for at, answer in enumerate(found):
            text = speaker.text(answer.token_ids)
            append_json(kept, {"source": str(rows[start + at].source), "answer": text, "finish": answer.finish_reason})
            answers.append(text)
    return rows, answers


def votes_of_file(poll: Poll, path: Path, rater: str) -> Iterator[tuple[str, int, Choice]]:
    """Votes that a program wrote: `row` (counted from 1), `choice`, and `rater` where it is another one.

    Raises:
        InputError: naming the line that is wrong; nothing was kept then.
    """
    numbers = {pair.row for pair in poll.pairs}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path, fix="name a JSONL file") from error
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where, fix = f"{path}:{at}", 'write {"row": 1, "choice": "left"}'
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"no JSON: {error.msg}", where=where, fix=fix) from error
        if not isinstance(values, dict) or values.get("row") not in numbers:
            raise InputError(f"no row of this poll; it has 1 to {len(numbers)}", where=where, fix=fix)
        who = str(values.get("rater", rater))
        yield who, values["row"], _choice(values.get("choice"), poll.left(who, values["row"]), where)


def _choice(given: Any, left: Side, where: str) -> Choice:
    sides: dict[str, Choice] = {"left": left, "right": "b" if left == "a" else "a"}
    if given in sides:
        return sides[given]
    if given in CHOICES:
        return cast(Choice, given)
    known = [*sides, *CHOICES]
    raise InputError(
        f"unknown choice {given!r}{nearest(str(given), known)}", where=where, fix=f"use one of {', '.join(known)}"
    )
