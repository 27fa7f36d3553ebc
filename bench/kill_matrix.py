"""Kills jobs at every moment there is, goes on with each, and compares what comes of it with a run nobody disturbed.

    python bench/kill_matrix.py [--only NAME …] [--every 1] [--seeds 20] [--out docs/results/reliability.md]

Needs Linux. Nothing is simulated: each row of the table is as many processes ended by SIGKILL. A moment is a change to
a file of the run (made, opened for writing, renamed, removed), a forward pass, or an update of the weights; the
process dies right before it, so that two moments enclose whatever happens between them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "faults")]

import jobs  # noqa: E402
from jobs import OUTPUT, Fault  # noqa: E402
from small_jobs import SCENARIOS, make_job, make_place  # noqa: E402

KILLED = -9
HEAD = """# Reliability

Written by `python bench/kill_matrix.py{options} --out docs/results/reliability.md`, which needs Linux and no GPU.
Each job runs as often as there are moments at which it can die: before every change to a file of the run (made, opened
for writing, renamed, removed), before every forward pass (in a step, inside an accumulation window, in validation, in
generation, in the evaluation of base and tuned model), before and after every update of the weights. At that moment the
process ends itself with SIGKILL; nothing is simulated. Then `tunesmith train recipe.yaml --resume` runs to its
end.{sampled}

- **lost**: the job did not end well after `--resume`, or a checkpoint that stood before is gone without a newer one.
- **differing**: files of the result, tensors of the last checkpoint (weights, optimizer, random states), answers of the
  evaluations, numbers of the report, `events.jsonl` apart from times, that are not the undisturbed run's, byte for
  byte.
- **damaged**: checkpoints or other files that stood under their final name at the moment of death and were not whole,
  by their manifest or by comparison.
- **left over**: files under a temporary name that stood after the end.

| job | moments | killed | lost | differing | damaged | left over |
|---|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """What came of one job's deaths.

    Attributes:
        troubles: what went wrong, a line for each, with the moment at which it can be seen again.
    """

    name: str
    moments: int = 0
    killed: int = 0
    lost: int = 0
    differing: int = 0
    damaged: int = 0
    left_over: int = 0
    troubles: list[str] = field(default_factory=list)

    def line(self) -> str:
        cells = (self.moments or "", self.killed, self.lost, self.differing, self.damaged, self.left_over)
        return f"| {self.name} | " + " | ".join(map(str, cells)) + " |\n"

    @property
    def clean(self) -> bool:
        return self.killed > 0 and not self.troubles


@dataclass
class Reference:
    """A run that nobody disturbed, and the recipe it came from."""

    root: Path
    name: str
    sections: dict[str, Any]
    directory: Path
    names: list[str]
    seconds: float
    traces: dict[str, str]

    @property
    def label(self) -> str:
        return self.directory.name

    def job(self, name: str) -> Path:
        return make_job(self.root, f"{self.label}-{name}", **self.sections)


def undisturbed(root: Path, name: str, watched: tuple[str, ...] = (OUTPUT,)) -> Reference:
    """Runs a job from beginning to end. Raises SystemExit when it does not even do that."""
    sections = SCENARIOS.get(name, {})
    directory = make_job(root, f"{len(list(root.iterdir()))}", **sections)
    started = time.monotonic()
    code = jobs.train(directory, fault=Fault(watched=watched, log="moments.json"))
    if code != 0:
        raise SystemExit(f"{name}: the undisturbed job ended with {code}\n{jobs.said(directory)}")
    found = jobs.traces(directory / OUTPUT)
    return Reference(root, name, sections, directory, jobs.moments(directory), time.monotonic() - started, found)


def judge(row: Row, reference: Reference, directory: Path, at: str, stood: int) -> None:
    """Goes on with a job that was killed, and notes whatever is not as it should be.

    Args:
        at: the moment, for the reader.
        stood: step of the newest checkpoint that a later moment of an undisturbed run would still hold.
    """
    run, troubles = directory / OUTPUT, []
    row.killed += 1
    if found := jobs.damage(run, reference.directory / OUTPUT):
        row.damaged += len(found)
        troubles += [f"damaged: {what}" for what in found]
    if jobs.newest(run) < stood:
        row.lost += 1
        troubles.append(f"lost: checkpoint step-{stood} is gone")
    code = jobs.train(directory, "--resume")
    if code == 2 and "no run here" in jobs.said(directory):
        code = jobs.train(directory)
    if code != 0:
        row.lost += 1
        troubles.append(f"lost: --resume ended with {code}: {_last_lines(directory)}")
    else:
        now = jobs.traces(run)
        differs = jobs.differences(now, reference.traces)
        left = jobs.leftovers(run)
        row.differing, row.left_over = row.differing + len(differs), row.left_over + len(left)
        troubles += [f"differs: {name}: {_unlike(now.get(name), reference.traces.get(name))}" for name in differs]
        troubles += [f"left over: {name}" for name in left]
    row.troubles += [f"{reference.name}, {at}: {trouble}" for trouble in troubles]
    shutil.rmtree(directory)


def _unlike(found: str | None, expected: str | None) -> str:
    """The place at which two texts part."""
    found, expected = found or "nothing", expected or "nothing"
    at = max(0, next((at for at, pair in enumerate(zip(found, expected, strict=False)) if len({*pair}) > 1), 0) - 40)
    return f"…{found[at : at + 120]}… instead of …{expected[at : at + 120]}…"


def _last_lines(directory: Path) -> str:
    return " / ".join(jobs.said(directory).strip().splitlines()[-2:])


def stood_before(names: list[str], at: int) -> int:
    """Step of the newest checkpoint whose renaming lies before a moment."""
    renamed = (name.split("step-")[1] for name in names[: at - 1] if name.startswith("os.rename") and "step-" in name)
    return max((int(text.split(".")[0]) for text in renamed if ".old" not in text), default=0)


def every_moment(root: Path, name: str, every: int, pool: ThreadPoolExecutor) -> Row:
    reference = undisturbed(root, name)
    row = Row(name, len(reference.names))

    def die(at: int) -> None:
        directory = reference.job(f"at{at}")
        code = jobs.train(directory, fault=Fault(at=at))
        moment = f"moment {at} ({reference.names[at - 1] if at <= row.moments else 'behind the end'})"
        if at > row.moments:
            if code != 0:
                row.troubles.append(f"{name}, {moment}: ended with {code}")
        elif code != KILLED:
            row.troubles.append(f"{name}, {moment}: not killed, but ended with {code}: {_last_lines(directory)}")
        else:
            judge(row, reference, directory, moment, stood_before(reference.names, at))

    # One moment more than there are: that job must end by itself, or moments were missed.
    list(pool.map(die, [*range(1, row.moments + 1, every), row.moments + 1]))
    return row


def writing_of_the_cache(root: Path, every: int, pool: ThreadPoolExecutor) -> Row:
    """Death while rows and tokens are stored for later jobs, which must not trust half of them."""
    watched = ("cache",)
    reference = undisturbed(root, "mixture", watched)
    row = Row("mixture, while the data cache is written", len(reference.names))

    def die(at: int) -> None:
        directory = reference.job(f"cache{at}")
        if jobs.train(directory, fault=Fault(at, watched=watched)) == KILLED:
            judge(row, reference, directory, f"moment {at} ({reference.names[at - 1]})", 0)

    list(pool.map(die, range(1, row.moments + 1, every)))
    return row


def at_random(root: Path, seeds: Iterable[int], pool: ThreadPoolExecutor) -> Row:
    """Deaths at any time whatsoever, up to three in a row, from outside."""
    reference = undisturbed(root, "lora, dropout, accumulation")
    row = Row("lora, dropout, accumulation; at random times, up to three in a row")

    def die(seed: int) -> None:
        draw = random.Random(seed)
        directory, killed = reference.job(f"seed{seed}"), 0
        for _ in range(draw.randint(1, 3)):
            arguments = ["--resume"] if (directory / OUTPUT / "recipe.yaml").exists() else []
            process = jobs.start(directory, "train", "recipe.yaml", *arguments)
            time.sleep(draw.uniform(0.1, 1.0) * reference.seconds)
            process.kill()
            killed += jobs.ended(process) == KILLED
        row.killed += killed - 1
        judge(row, reference, directory, f"seed {seed}", 0)

    list(pool.map(die, seeds))
    return row


def head(every: int) -> str:
    """The page up to its table, saying so when only some of the moments were tried."""
    if every == 1:
        return HEAD.format(options="", sampled="")
    return HEAD.format(options=f" --every {every}", sampled=f" On this page one in {every} of these moments was tried.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*SCENARIOS, "cache", "random"], help="these jobs alone")
    parser.add_argument("--every", type=int, default=1, help="only each N-th moment")
    parser.add_argument("--seeds", type=int, default=20, help="jobs that are killed at random times")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = parser.parse_args()
    chosen = given.only or [*SCENARIOS, "cache", "random"]
    place = Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    rows: list[Row] = []
    try:
        make_place(place)
        with ThreadPoolExecutor(given.workers) as pool:
            for name in chosen:
                if name == "cache":
                    row = writing_of_the_cache(place, given.every, pool)
                elif name == "random":
                    row = at_random(place, range(given.seeds), pool)
                else:
                    row = every_moment(place, name, given.every, pool)
                rows.append(row)
                print(row.line() + "".join(f"  {trouble}\n" for trouble in row.troubles), end="", file=sys.stderr)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(head(given.every) + "".join(row.line() for row in rows), encoding="utf-8")
    return 0 if all(row.clean for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
