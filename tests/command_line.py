"""The command line as a user calls it, without its imports each time: forked from a process that has made them.

Where processes cannot be forked it is started anew. What a start itself does is tested in test_cli and bench/startup.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import cast

SOURCE = str(Path(__file__).parents[1] / "src")
SECONDS = 300


def tunesmith(
    *arguments: object, cwd: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What `tunesmith ARGUMENTS` said, and its exit code."""
    return _done(["-m", "tunesmith", *map(str, arguments)], cwd, stdin)


def python(code: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `python -c CODE ARGUMENTS` said, and its exit code; the number of a signal is negative."""
    return _done(["-c", code, *map(str, arguments)], cwd, None)


def _done(command: list[str], cwd: Path | None, stdin: str | None) -> subprocess.CompletedProcess[str]:
    if not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=_environment(),
            cwd=cwd,
            input=stdin,
            timeout=SECONDS,
        )
    with tempfile.TemporaryDirectory() as place:
        asked = {"command": command, "place": place, "cwd": str(cwd or Path.cwd())}
        given, said, told = (Path(place) / name for name in ("stdin", "stdout", "stderr"))
        given.write_text(stdin or "", encoding="utf-8")
        code = _ask(asked)
        return subprocess.CompletedProcess(command, code, said.read_text("utf-8"), told.read_text("utf-8"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    )
    atexit.register(server.kill)
    return server


def _ask(asked: dict[str, object]) -> int:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def _serve() -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tunesmith.cli.app
    import tunesmith.pipeline.finetune  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(asked: dict[str, object]) -> None:
    """Runs the command in this process, which ends with it."""
    import runpy
    import signal
    import traceback

    signal.alarm(SECONDS)
    place, code = Path(str(asked["place"])), 0
    for number, (name, flags) in enumerate(
        [("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT)]
    ):
        os.dup2(os.open(place / name, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one may have read ahead
    os.chdir(str(asked["cwd"]))
    how, what, *arguments = cast("list[str]", asked["command"])
    sys.argv = [how, *arguments]
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
