"""Blind votes: who sits where, what is kept, what they come to; and a model that judges, over a small server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError, TunesmithError, silent
from tunesmith.cli import ballot
from tunesmith.cli.vote import Ballot, JudgeOptions, result_lines, run_vote
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.model_judge import verdict_of
from tunesmith.evaluation.votes import Choice, Pair, Vote, left_of, standing, vote_results, win_rate
from tunesmith.files import append_json, read_json_lines
from tunesmith.metrics.proportions import wilson
from tunesmith.pipeline.voting import Asked, Poll, open_poll, votes_of_file

ROWS = 6


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Two files of answers to six rows; the answers to the last one are equal."""
    on = write_jsonl(tmp_path / "on.jsonl", colour_rows(ROWS))
    a = write_jsonl(tmp_path / "good.jsonl", [{"answer": f"good {at}" if at < 5 else "same"} for at in range(ROWS)])
    b = write_jsonl(tmp_path / "bad.jsonl", [{"text": f"bad {at}" if at < 5 else " same "} for at in range(ROWS)])
    return Asked(str(a), str(b), str(on), 50, 0, 16)


@pytest.fixture
def poll(asked: Asked, tmp_path: Path) -> Poll:
    return open_poll(asked, tmp_path / "poll", silent)


# --- what is kept ---


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json(path, {"one": "ü"})
    with open(path, "ab") as file:
        file.write(b'{"two": ')
    assert read_json_lines(path) == [{"one": "ü"}]
    append_json(path, {"three": 3})
    assert read_json_lines(path) == [{"one": "ü"}, {"three": 3}]
    assert read_json_lines(tmp_path / "nowhere") == []


def test_sides_depend_on_seed_row_and_rater_and_are_about_even() -> None:
    sides = [left_of(0, "ann", row) for row in range(200)]
    assert 70 < sides.count("a") < 130
    assert sides == [left_of(0, "ann", row) for row in range(200)]
    assert sides != [left_of(0, "bob", row) for row in range(200)] != [left_of(1, "bob", row) for row in range(200)]


def test_a_vote_is_kept_with_its_side_and_can_be_taken_back(poll: Poll) -> None:
    poll.cast("ann", 1, "a")
    poll.cast("ann", 2, "tie")
    poll.take_back("ann", 2)
    poll.cast("bob", 2, "b")
    lines = read_json_lines(poll.path / "votes.jsonl")
    assert lines[0] == {"row": 1, "rater": "ann", "choice": "a", "left": left_of(0, "ann", 1)}
    assert poll.votes() == [Vote(1, "ann", "a", left_of(0, "ann", 1)), Vote(2, "bob", "b", left_of(0, "bob", 2))]
    assert [pair.row for pair in poll.open_rows("ann")] == [2, 3, 4, 5]  # 6 has nothing to choose
    assert standing([{"row": 1, "rater": "x", "undo": True}]) == []


def test_the_same_command_finds_the_poll_again_and_another_one_is_refused(poll: Poll, asked: Asked) -> None:
    poll.cast("ann", 1, "a")
    again = open_poll(asked, poll.path, silent)
    assert again.pairs == poll.pairs and len(again.votes()) == 1
    with pytest.raises(InputError, match="another poll is kept here: seed differ"):
        open_poll(Asked(asked.a, asked.b, asked.on, 50, 1, 16), poll.path, silent)
    with pytest.raises(InputError, match="no such file"):
        open_poll(Asked(asked.a, asked.b, asked.on + "x", 50, 1, 16), poll.path, silent)
    Path(asked.on).write_text(Path(asked.on).read_text() + "\n")
    with pytest.raises(InputError, match="has changed since"):
        open_poll(asked, poll.path, silent)


# --- what the votes come to ---


def pairs(count: int) -> list[Pair]:
    return [Pair(row, f"on:{row}", "?", [], f"a{row}", f"b{row}") for row in range(1, count + 1)]


def votes(rater: str, choices: list[Choice]) -> list[Vote]:
    return [Vote(row, rater, choice, "a") for row, choice in enumerate(choices, start=1)]


def test_the_win_rate_counts_ties_half_and_leaves_skipped_rows_out() -> None:
    found = vote_results(pairs(8), votes("ann", ["a", "a", "a", "b", "tie", "both_bad", "skip"]), 0.95)
    assert found["rows"] == 6 and found["win_rate"] == pytest.approx(4 / 6) and found["unvoted"] == 2
    assert (found["low"], found["high"]) == wilson(4.0, 6, 0.95)
    assert (found["wins"], found["losses"], found["ties"]) == (3, 1, 2) and found["p"] == binomtest(3, 4).pvalue
    (rater,) = found["raters"]
    assert rater["choices"] == {"a": 3, "b": 1, "tie": 1, "both_bad": 1, "skip": 1} and rater["left"] == 0.75
    assert found["agreement"] is None


def test_rows_count_once_however_many_voted_and_agreement_is_of_preferences() -> None:
    both = [*votes("ann", ["a", "a", "b", "tie"]), *votes("bob", ["a", "b", "b", "both_bad"])]
    found = vote_results(pairs(4), both, 0.95)
    assert found["rows"] == 4 and found["votes"] == 8 and found["win_rate"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert found["agreement"]["rows"] == 4 and found["agreement"]["share"] == 0.75
    assert 0 < found["agreement"]["alpha"] < 1  # a tie and two bad answers are the same preference


def test_votes_of_a_file_on_rows_with_equal_answers_count_nowhere() -> None:
    same = [*pairs(2)[:1], replace(pairs(2)[1], b=pairs(2)[1].a)]
    found = vote_results(same, votes("bob", ["b", "tie"]), 0.95)
    assert found["same"] == 1 and found["rows"] == 1 and found["raters"][0]["rows"] == 1
    assert found["raters"][0]["choices"]["tie"] == 0


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.yaml").write_text("model: demo\n")
    with pytest.raises(InputError, match=r"there is no run here; did you mean '.*first'"):
        open_poll(Asked(str(tmp_path / "frist"), "base", "on.jsonl", 50, 0, 8), tmp_path / "poll", silent)


def test_nothing_is_claimed_of_no_votes() -> None:
    found = vote_results(pairs(3), [], 0.95)
    assert found["win_rate"] is None and found["low"] is None and found["p"] == 1.0 and found["unvoted"] == 3
    assert win_rate([1.0] * 20, 0.95)["low"] > 0.8


# --- on the terminal, and from a file ---


def test_a_rater_votes_key_by_key(
    poll: Poll, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = iter(["x", "e", "1", "2", "u", "\x1b[C", "t", "b", "s", "u", "4", "n"])
    monkeypatch.setattr(ballot.typer, "getchar", lambda: next(keys))
    monkeypatch.setenv("COLUMNS", "100")
    ballot.ask_rater(poll, "ann")
    shown = capsys.readouterr().out
    assert (
        "row 1 of 5 · ann" in shown and "good 0" in shown and "Expected" in shown and "That was the last row" in shown
    )
    assert "good.jsonl" not in shown and "bad.jsonl" not in shown
    kept = {vote.row: vote for vote in poll.votes()}
    assert kept[1].choice == kept[1].left and kept[2].choice != kept[2].left
    assert [kept[row].choice for row in (3, 4, 5)] == ["tie", "both_bad", "both_bad"]


def test_a_rater_who_stops_goes_on_later(poll: Poll, monkeypatch: pytest.MonkeyPatch) -> None:
    for typed in (["1", "q"], ["2", "\x03"]):
        keys = iter(typed)
        monkeypatch.setattr(ballot.typer, "getchar", lambda keys=keys: next(keys))
        ballot.ask_rater(poll, "ann")
    assert [vote.row for vote in poll.votes()] == [1, 2]


def test_what_steers_a_terminal_is_made_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    on = write_jsonl(tmp_path / "on.jsonl", colour_rows(1))
    a = write_jsonl(tmp_path / "a.jsonl", [{"answer": "\x1b[2Jgone [bold]marked[/bold]"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"answer": ""}])
    poll = open_poll(Asked(str(a), str(b), str(on), 9, 0, 9), tmp_path / "poll", silent)
    monkeypatch.setattr(ballot.typer, "getchar", lambda: "q")
    ballot.ask_rater(poll, "ann")
    shown = capsys.readouterr().out
    assert "␛[2Jgone [bold]marked[/bold]" in shown and "(empty)" in shown


def test_programs_bring_their_votes_in_a_file(asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"row": 1, "choice": "left"}, {"row": 2, "choice": "a"}, {"row": 2, "choice": "b", "rater": "bob"}]
    file = write_jsonl(tmp_path / "votes.jsonl", given)
    options = Ballot(asked.a, asked.b, asked.on, "ann", 50, 16, 0, tmp_path / "poll", file)
    run_vote(options, JudgeOptions(None, None, None), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["votes"] == 3 and [rater["rater"] for rater in found["raters"]] == ["ann", "bob"]
    lines = "\n".join(result_lines(found))
    assert "no difference shown" in lines and "1 rows with equal answers" in lines and "3 rows without a vote" in lines


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "no JSON"),
        ('{"row": 9, "choice": "a"}', "no row of this poll; it has 1 to 6"),
        ('{"row": 1, "choice": "lefft"}', "unknown choice 'lefft'; did you mean 'left'?"),
    ],
)
def test_a_wrong_vote_in_a_file_is_named(line: str, what: str, poll: Poll, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text('{"row": 1, "choice": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"votes.jsonl:2: {what}".replace("?", r"\?")):
        list(votes_of_file(poll, file, "ann"))
    with pytest.raises(InputError, match="cannot be read"):
        list(votes_of_file(poll, tmp_path / "nowhere.jsonl", "ann"))


# --- what is refused ---


def test_what_is_missing_or_wrong_on_the_command_line_is_said(asked: Asked, tmp_path: Path) -> None:
    def refused(match: str, a: Any, b: Any, on: Any, judge: JudgeOptions = JudgeOptions(None, None, None)) -> None:
        with pytest.raises(InputError, match=match):
            run_vote(Ballot(a, b, on, "ann", 50, 16, 0, tmp_path / "poll", None), judge, as_json=False)

    refused("needs two systems", asked.a, None, asked.on)
    refused("no rows to answer", asked.a, asked.b, None)
    refused("needs a terminal", asked.a, asked.b, asked.on)
    refused("which model judges is missing", asked.a, asked.b, asked.on, JudgeOptions("http://x/v1", None, None))
    refused("whom to ask is missing", asked.a, asked.b, asked.on, JudgeOptions(None, "m", None))
    refused(
        "NO_SUCH_VARIABLE is not set", asked.a, asked.b, asked.on, JudgeOptions("http://x", "m", "NO_SUCH_VARIABLE")
    )
    refused("is no address", asked.a, asked.b, asked.on, JudgeOptions("localhost:8000", "m", None))
    refused("a key does not belong", asked.a, asked.b, asked.on, JudgeOptions("http://me:key@x/v1", "m", None))
    assert not (tmp_path / "poll").exists()


def test_systems_that_cannot_be_compared_are_refused(asked: Asked, tiny_model: Path, tmp_path: Path) -> None:
    def refused(match: str, a: str, b: str, on: str = asked.on) -> None:
        with pytest.raises(InputError, match=match):
            open_poll(Asked(a, b, on, 50, 0, 8), tmp_path / f"poll-{abs(hash(match))}", silent)

    refused("A and B are the same", asked.a, asked.a)
    refused("a file of answers has no base", asked.a, "base")
    refused("a model by itself has no base", str(tiny_model), "base")
    few = write_jsonl(tmp_path / "few.jsonl", [{"answer": "one"}])
    refused("1 answers, and .* has 6 rows", asked.a, str(few))
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"reply": "one"}])
    refused(r"wrong.jsonl:1: this line holds no answer", asked.a, str(wrong))
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "raw text"}])
    refused("this row has no prompt to answer", asked.a, asked.b, str(text))
    refused("no such file", asked.a, asked.b, str(tmp_path / "nowhere.jsonl"))
    assert not list(tmp_path.glob("poll-*"))  # nothing is left of a poll that could not be made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        open_poll(asked, tmp_path / "full", silent)
    with pytest.raises(InputError, match="there is no poll here"):
        Poll.open(tmp_path / "full")


def test_a_damaged_poll_is_named(poll: Poll) -> None:
    (poll.path / "votes.jsonl").write_text("{nonsense}\n")
    with pytest.raises(InputError, match="this poll is damaged"):
        poll.votes()
    (poll.path / "pairs.jsonl").unlink()
    with pytest.raises(InputError, match="not all written yet"):
        Poll.open(poll.path)


# --- answers of models ---


def test_models_answer_once_and_an_interrupted_poll_keeps_what_is_written(
    tiny_model: Path, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.pipeline import voting

    mixed = Asked(str(tiny_model), asked.b, asked.on, 5, 0, 6)
    whole = open_poll(mixed, tmp_path / "whole", silent)
    assert len(whole.pairs) == 5 and [pair.b for pair in whole.pairs][:2] == ["bad 0", "bad 1"]
    written = (whole.path / "answers.a.jsonl").read_bytes()
    other = tmp_path / "other"
    monkeypatch.setattr(voting, "AT_ONCE", 2)

    def killed(label: str, done: int, total: int | None) -> None:
        if label.startswith("answers") and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_poll(mixed, other, killed)
    assert len(read_json_lines(other / "answers.a.jsonl")) == 4
    again = open_poll(mixed, other, silent)
    assert (again.path / "answers.a.jsonl").read_bytes() == written and again.pairs == whole.pairs


# --- a model that judges ---


class Judge(BaseHTTPRequestHandler):
    """Prefers the good answers to even rows wherever they stand, and whatever it reads first otherwise."""

    requests: list[dict[str, Any]]
    failures: list[int]

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        self.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        status = self.failures.pop(0) if self.failures else 200
        text = body["messages"][-1]["content"]
        first = text.index("good ") < text.index("bad ")
        number = int(text.split("good ")[1][0])
        said = "I cannot say" if number == 4 else "[[1]]" if number % 2 or first else "thinking… [[2]]"
        reply = {
            "choices": [{"message": {"role": "assistant", "content": said}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 5},
        }
        if status == 201:
            reply = {"choices": []}
        elif status != 200:
            reply = {"error": {"message": f"no: {self.headers.get('Authorization')}"}}
        sent = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Judge.requests, Judge.failures = [], []
    running = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def test_a_judge_is_asked_in_both_orders_and_what_changes_with_them_is_a_tie(poll: Poll, server: str) -> None:
    for row, choice in enumerate(("a", "b", "a", "tie"), start=1):
        poll.cast("ann", row, choice)  # type: ignore[arg-type]
    poll.judge(Endpoint(server, "judge-1", "secret-key"), silent)
    assert len(Judge.requests) == 10 and all(one["temperature"] == 0 for one in Judge.requests)
    assert {one["path"] for one in Judge.requests} == {"/v1/chat/completions"}
    assert {one["key"] for one in Judge.requests} == {"Bearer secret-key"}
    (found,) = poll.results()["judges"]
    assert (found["rows"], found["wins"], found["losses"], found["ties"]) == (4, 2, 0, 2)
    assert found["changed"] == 2 and found["unparsable"] == 2 and found["undecided"] == 1
    assert found["first"] == 0.75 and found["second"] == 0.25
    assert found["tokens"] == {"prompt": 1000, "completion": 50}
    assert found["agreement"]["rows"] == 4 and found["agreement"]["share"] == 0.75
    for file in poll.path.iterdir():
        assert "secret-key" not in file.read_text(), file
    lines = "\n".join(result_lines(poll.results()))
    assert "judge-1 as judge" in lines and "2 rows changed with the places" in lines and "1,000 tokens read" in lines


def test_trouble_that_passes_is_waited_for_and_what_was_judged_is_kept(poll: Poll, server: str) -> None:
    waits: list[float] = []
    endpoint = Endpoint(server, "judge-1", wait=waits.append)
    Judge.failures = [503, 429, 200]
    poll.judge(endpoint, silent)
    assert waits == [1.0, 7.0] and len(Judge.requests) == 12
    poll.judge(endpoint, silent)
    assert len(Judge.requests) == 12  # nothing is asked twice
    Judge.failures = [500] * 5
    with pytest.raises(TunesmithError, match="did not answer in 5 tries") as caught:
        poll.judge(Endpoint(server, "judge-2", wait=waits.append), silent)
    assert caught.value.exit_code == 1 and waits[2:] == [1.0, 2.0, 4.0, 8.0]


def test_a_refusal_ends_it_and_does_not_tell_the_key(poll: Poll, server: str) -> None:
    Judge.failures = [401]
    with pytest.raises(InputError, match="refuses with status 401") as caught:
        poll.judge(Endpoint(server, "judge-1", "secret-key"), silent)
    assert "secret-key" not in str(caught.value) and "--judge-key-env" in str(caught.value)
    assert "secret-key" not in repr(Endpoint(server, "judge-1", "secret-key"))


def test_what_is_no_chat_completion_is_said(server: str) -> None:
    Judge.failures = [201]
    with pytest.raises(TunesmithError, match="no chat completion"):
        Endpoint(server, "judge-1").ask([{"role": "user", "content": "good 0 bad 0"}], 5)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("[[1]]", "first"), ("[[1]] no, [[ 2 ]]", "second"), ("so [[TIE]].", "tie"), ("1", None), ("", None)],
)
def test_the_last_verdict_counts(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict
