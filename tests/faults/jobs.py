"""Real jobs in real processes that die for real: how they are started, when they are killed, what they leave.

Starting Python with torch takes seconds, so jobs are forked from a server that has imported everything and run nothing
(`multiprocessing`'s forkserver). Each is the command line itself, in a process and a session of its own.

The moments at which a job can be killed are counted inside it, by what Python and torch announce by themselves: audit
events of every change to a file below a watched directory, and torch's global hooks before and after each forward pass
of a decoder and each update of an optimizer. Nothing of the package is replaced.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.modules.module as every_module
import torch.optim.optimizer as every_optimizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

PRELOADED = [
    "jobs",
    "datasets",
    "jinja2",
    "sacrebleu",
    "rouge_score.rouge_scorer",
    "transformers.models.llama.modeling_llama",
    "tunesmith.cli.check",
    "tunesmith.cli.train",
    "tunesmith.pipeline.finetune",
]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
get_checkpoint_conversion_mapping("llama")  # a table that the library makes once a process, in a third of a second
SAID = "said.txt"
RECIPE = "recipe.yaml"
_starting = threading.Lock()
"""Starting a process asks after all the others too, and an exit code can be read only once."""
OUTPUT = "run"


@dataclass(frozen=True)
class Fault:
    """What befalls a job.

    Attributes:
        at: the moment, counted from 1, at which it happens; 0 is never.
        named: count only moments whose name begins like this.
        does: `die` by SIGKILL, `wait` for others to act (a file `paused` says that the moment came, and a file `go`
            ends the waiting), or from there on have no more than `memory` bytes of address space beyond those in use.
        watched: directories, relative to the job's, below which changes of files are moments.
        log: file that receives the names of all moments when the job ends by itself.
    """

    at: int = 0
    named: str = ""
    does: Literal["die", "wait", "starve"] = "die"
    memory: int = 0
    watched: tuple[str, ...] = (OUTPUT,)
    log: str | None = None


def server() -> Any:
    """The context whose processes are forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(directory: Path, *arguments: str, fault: Fault | None = None) -> Any:
    """Starts `tunesmith` with ``arguments`` in a directory, and returns the process; what it says is in `said.txt`."""
    process = server().Process(target=_job, args=(str(directory), arguments, fault or Fault()))
    with _starting:
        process.start()
    return process


def run(directory: Path, *arguments: str, fault: Fault | None = None, timeout: float = 120) -> int:
    """Runs `tunesmith` and returns its exit code; that of a killed process is minus the signal.

    Raises:
        TimeoutError: when it has not ended in time; it is killed then.
    """
    return ended(start(directory, *arguments, fault=fault), timeout)


def ended(process: Any, timeout: float = 120) -> int:
    if not wait([process.sentinel], timeout):
        process.kill()
        raise TimeoutError(f"the job did not end within {timeout} s")
    with _starting:
        return process.exitcode


def train(directory: Path, *more: str, fault: Fault | None = None) -> int:
    return run(directory, "train", RECIPE, *more, fault=fault)


def said(directory: Path) -> str:
    return (directory / SAID).read_text(encoding="utf-8")


def start_and_wait(directory: Path, *more: str, named: str, at: int = 1) -> Any:
    """Starts a job and returns its process when it waits at a moment."""
    for name in ("paused", "go"):
        (directory / name).unlink(missing_ok=True)
    process = start(directory, "train", RECIPE, *more, fault=Fault(at=at, named=named, does="wait"))
    wait_until((directory / "paused").exists, process)
    return process


def go(directory: Path) -> None:
    (directory / "go").touch()


def wait_until(condition: Callable[[], bool], process: Any = None, timeout: float = 60) -> None:
    """Waits for something to happen while a process lives. Raises TimeoutError when it does not."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end or (process is not None and process.exitcode is not None):
            raise TimeoutError("it did not happen")
        time.sleep(0.002)


def _job(directory: str, arguments: tuple[str, ...], fault: Fault) -> None:
    os.setsid()
    os.chdir(directory)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(SAID, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TUNESMITH_DATA_CACHE"] = str(Path("cache").absolute())
    torch.set_num_threads(1)
    from tunesmith.cli import main

    sys.argv = ["tunesmith", *arguments]
    code: Any = 0
    with _moments(fault):
        try:
            main()
        except SystemExit as end:
            code = end.code
    sys.exit(code)


@contextmanager
def _moments(fault: Fault) -> Iterator[None]:
    """Counts the moments of this process, and ends it at the one that was chosen."""
    roots = tuple(str(Path(name).absolute()) for name in fault.watched)
    here, count, names, counting = os.getcwd(), 0, [], True

    def moment(name: str) -> None:
        nonlocal count
        names.append(name)
        count += name.startswith(fault.named)
        if count == fault.at and name.startswith(fault.named):
            _befall(fault, Path(here))

    def heard(event: str, values: tuple[Any, ...]) -> None:
        if not counting or (event != "open" and event not in CHANGES):
            return
        if event == "open" and not (isinstance(values[2], int) and values[2] & WRITING):
            return
        if not isinstance(values[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(values[0])
        # shutil.rmtree names files relative to directories that it holds open.
        inside = os.path.join(here, path).startswith(roots) or (not os.path.isabs(path) and event == "os.remove")
        if inside:
            moment(f"{event} {os.path.relpath(os.path.join(here, path), here)}")

    def forward(module: Any, values: Any) -> None:
        if type(module).__name__ == "Embedding":  # with which every pass begins, whoever runs the blocks
            moment("forward, training" if module.training else "forward, evaluating")

    original = safetensors.torch.serialize_file

    def serialize(tensors: Any, filename: Any, *rest: Any, **named: Any) -> Any:
        moment(f"tensors {os.path.basename(filename)}")
        return original(tensors, filename, *rest, **named)

    sys.addaudithook(heard)
    every_module.register_module_forward_pre_hook(forward)
    every_optimizer.register_optimizer_step_pre_hook(lambda *values: moment("optimizer, before"))
    every_optimizer.register_optimizer_step_post_hook(lambda *values: moment("optimizer, after"))
    # The library writes files outside Python, where no audit event tells of it.
    safetensors.torch.serialize_file = serialize
    try:
        yield
    finally:
        counting = False
        if fault.log is not None:
            Path(here, fault.log).write_text(json.dumps(names), encoding="utf-8")


def _befall(fault: Fault, here: Path) -> None:
    if fault.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.does == "starve":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + fault.memory, resource.RLIM_INFINITY))
    else:
        (here / "paused").touch()
        end = time.monotonic() + 60
        while not (here / "go").exists() and time.monotonic() < end:
            time.sleep(0.002)


def moments(directory: Path, name: str = "moments.json") -> list[str]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def traces(run: Path) -> dict[str, str]:
    """What must be equal in two runs of the same recipe: file or list of events to SHA-256 of its content."""
    last = max((path for path in _checkpoints(run)), key=lambda path: int(path.name[5:]), default=None)
    files = [path for name in ("adapter", "model") for path in sorted((run / name).rglob("*")) if path.is_file()]
    files += [run / name for name in ("evaluation.base.json", "evaluation.tuned.json", "data.json", "recipe.yaml")]
    files += sorted(last.iterdir()) if last is not None else []
    found = {str(path.relative_to(run)): _digest(path) for path in files if path.is_file()}
    found["checkpoints"] = " ".join(sorted(path.name for path in _checkpoints(run)))
    found["events.jsonl"] = json.dumps([_timeless(event) for event in _events(run)])
    if (run / "report.json").is_file():
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        parts = ("verdict", "sentence", "gate", "metrics", "forgetting", "samples", "warnings", "curves")
        found["report.json"] = json.dumps({name: report[name] for name in parts})
    for name in list(found):
        if name.endswith(("state.json", "manifest.json")):
            found[name] = "present"  # its times differ; what else it holds shows in the events and in the weights
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def damage(run: Path, expected: Path | None = None) -> list[str]:
    """What is half-written under a final name, at whatever moment the run is looked at.

    Args:
        expected: a finished run of the same recipe, whose result is what this one's must be once it stands.
    """
    found = [f"{path.name}: {what}" for path in _checkpoints(run) if (what := _unsound(path))]
    for path in run.glob("*.json") if run.is_dir() else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found.append(f"{path.name} is half-written")
    for name in ("adapter", "model"):
        if expected is not None and (run / name).is_dir():
            now, then = ({f.name: _digest(f) for f in (root / name).iterdir()} for root in (run, expected))
            found += [f"{name}: {part}" for part in differences(now, then)]
    return found


def leftovers(run: Path) -> list[str]:
    """Files in a run and beside it that bear no final name."""
    places = [*run.rglob("*"), *run.parent.glob(f"{run.name}.*")]
    return sorted(str(path.relative_to(run.parent)) for path in places if ".partial" in path.name)


def newest(run: Path) -> int:
    """Step of the newest checkpoint, or 0."""
    return max((int(path.name[5:]) for path in _checkpoints(run)), default=0)


def _checkpoints(run: Path) -> list[Path]:
    places = (run / "checkpoints").glob("step-*")
    return [path for path in places if path.is_dir() and path.name[5:].isdigit()]


def _unsound(checkpoint: Path) -> str | None:
    """Reads the manifest by itself: the package's own check is not what vouches for the package."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        listed = manifest.get("files", manifest)
        present = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
        if listed.keys() != present:
            return f"holds {sorted(present)}, its manifest lists {sorted(listed)}"
        return next((name for name in sorted(present) if _digest(checkpoint / name) not in str(listed[name])), None)
    except (OSError, ValueError, AttributeError) as error:
        return f"no manifest that can be read: {error}"


def _events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(inner) for name, inner in value.items() if "seconds" not in name and "time" not in name}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
