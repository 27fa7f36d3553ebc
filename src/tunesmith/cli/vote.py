"""`tunesmith vote`: the poll is made, people or a model vote, and the result is printed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.pipeline.voting import Asked, Poll, open_poll, votes_of_file


@dataclass(frozen=True)
class Ballot:
    """What was asked on the command line."""

    a: str | None
    b: str | None
    on: str | None
    rater: str
    rows: int
    max_new_tokens: int
    seed: int
    out: Path | None
    votes: Path | None

    def asked(self) -> Asked:
        """Raises InputError for what is missing."""
        if not self.a or not self.b:
            raise InputError(
                "a vote needs two systems",
                where="vote",
                fix="tunesmith vote runs/mine base --on held-out.jsonl, or tunesmith vote --results DIR",
            )
        if not self.on:
            raise InputError(
                "there are no rows to answer", where="--on", fix="name a file of rows: --on held-out.jsonl"
            )
        return Asked(self.a, self.b, self.on, self.rows, self.seed, self.max_new_tokens)


@dataclass(frozen=True)
class JudgeOptions:
    """The model that judges, if one was named."""

    url: str | None
    model: str | None
    key_env: str | None

    def endpoint(self) -> Endpoint | None:
        """Raises InputError for what is missing or wrong."""
        if self.url is None:
            if self.model or self.key_env:
                raise InputError(
                    "whom to ask is missing", where="--judge", fix="name its address: --judge http://HOST/v1"
                )
            return None
        if not self.model:
            raise InputError("which model judges is missing", where="--judge-model", fix="--judge-model NAME")
        key = os.environ.get(self.key_env) if self.key_env else None
        if self.key_env and not key:
            raise InputError(
                f"the environment variable {self.key_env} is not set",
                where="--judge-key-env",
                fix="export it, or name the one that holds the key (the name, not the key)",
            )
        return Endpoint(self.url, self.model, key)


def run_vote(ballot: Ballot, judge: JudgeOptions, *, as_json: bool) -> None:
    """Makes or reopens the poll, takes votes, and prints the result."""
    asked, endpoint = ballot.asked(), judge.endpoint()
    by_hand = endpoint is None and ballot.votes is None
    if by_hand and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError(
            "voting by hand needs a terminal, and this is none",
            where="vote",
            fix='run it in one; or take votes from a file, --votes FILE with lines {"row": 1, "choice": "left"}; or '
            "let a model judge: --judge URL --judge-model NAME",
        )
    quiet_libraries()
    with Display(as_json) as display:
        poll = open_poll(asked, ballot.out or asked.directory(), display.progress)
        if endpoint is not None:
            poll.judge(endpoint, display.progress)
    if ballot.votes is not None:
        for who, row, choice in list(votes_of_file(poll, ballot.votes, ballot.rater)):
            poll.cast(who, row, choice)
    if by_hand:
        from tunesmith.cli.ballot import ask_rater

        ask_rater(poll, ballot.rater)
        left = len(poll.open_rows(ballot.rater))
        if left:  # a result would say who is who to somebody who has yet to vote
            out(
                f"{left} rows are left: the same command goes on; tunesmith vote --results {poll.path} shows the result"
            )
            return
    show_results(poll.path, as_json=as_json)


def show_results(path: Path, *, as_json: bool) -> None:
    """Prints what the votes of a poll come to."""
    results = Poll.open(path).results()
    out(json.dumps(results, ensure_ascii=False) if as_json else "\n".join(result_lines(results)))


def result_lines(results: dict[str, Any]) -> list[str]:
    """The result as people read it."""
    lines = [f"A is {results['a']}, B is {results['b']}; {results['pairs']} rows of {results['on']}", ""]
    if results["votes"]:
        lines.append(_sentence("votes", results))
        rows = [["rater", "votes", "A", "B", "tie", "both bad", "skipped", "A wins", "interval", "left"]]
        for rater in results["raters"]:
            counts = rater["choices"]
            figures = [str(counts[name]) for name in ("a", "b", "tie", "both_bad", "skip")]
            rows.append([rater["rater"], str(rater["rows"]), *figures, _share(rater["win_rate"]), _span(rater)])
            rows[-1].append(_share(rater["left"]))
        lines += ["", *aligned(rows, right={1, 2, 3, 4, 5, 6, 7, 9})]
        if results["agreement"]:
            lines.append(f"agreement of raters: {_agreement(results['agreement'])}")
    else:
        lines.append("nobody has voted yet")
    told = [
        (results["same"], "with equal answers, which nobody is asked about"),
        (results["unvoted"], "without a vote"),
    ]
    lines += [f"{count} rows {what}" for count, what in told if count]
    for judge in results["judges"]:
        lines += ["", *_judge_lines(judge)]
    return [*lines, "", f"kept in {results['poll']}"]


def _judge_lines(judge: dict[str, Any]) -> list[str]:
    tokens = judge["tokens"]
    spent = "the endpoint does not say how many tokens"
    if tokens["prompt"] is not None:
        spent = f"{tokens['prompt']:,} tokens read and {tokens['completion']:,} written"
    lines = [
        _sentence(f"{judge['model']} as judge", judge),
        f"  places: the first answer was chosen in {_share(judge['first'])} of decided verdicts; "
        f"{judge['changed']} rows changed with the places and count as ties",
    ]
    if judge["unparsable"]:
        lines.append(f"  {judge['unparsable']} answers held no verdict")
    if judge["undecided"]:
        lines.append(f"  {judge['undecided']} rows lack one of their two verdicts and are left out")
    lines.append(f"  cost: {spent}")
    told = judge["agreement"]
    lines.append(f"  agreement with people: {_agreement(told) if told else 'no row has both'}")
    return lines


def _sentence(who: str, found: dict[str, Any]) -> str:
    if not found["rows"]:
        return f"{who}: nothing was decided"
    better = "no difference shown"
    if found["low"] > 0.5 or found["high"] < 0.5:
        better = f"{'A' if found['low'] > 0.5 else 'B'} is better"
    rate = (
        f"A wins {_share(found['win_rate'])} of {found['rows']} rows, ties counted half (95 % interval {_span(found)})"
    )
    counts = f"{found['wins']} won, {found['losses']} lost, {found['ties']} tied"
    return f"{who}: {better}; {rate}; {counts}, sign test p = {found['p']:.3g}"


def _agreement(found: dict[str, Any]) -> str:
    alpha = "cannot be told, all chose alike" if found["alpha"] is None else f"{found['alpha']:.2f}"
    return f"Krippendorff's alpha {alpha}, the same in {_share(found['share'])} of pairs, {found['rows']} rows"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _span(found: dict[str, Any]) -> str:
    return "none" if found["low"] is None else f"{found['low']:.1%} … {found['high']:.1%}"
