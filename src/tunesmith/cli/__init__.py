"""The command line: thin verbs over the pipeline. Heavy libraries are imported inside the verbs."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.base import TunesmithError


def main() -> None:
    """Runs the command line; the exit code is 0, 1 (a bug or a dead run), 2 (input), 3 (gate) or 130 (interrupted)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, or forks are warned of
    from tunesmith.cli.app import app

    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130 and _was_interrupted(end):  # which typer turns into an exit without a word
            print("interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        # The reader went away, as `head` does; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from tunesmith.base import TunesmithError  # not above: pydantic would slow down --help

        if not isinstance(error, TunesmithError):
            raise
        _tell(error)
        sys.exit(error.exit_code)


def _was_interrupted(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__context__))


def _tell(error: TunesmithError) -> None:
    if "--json" in sys.argv:
        line = {
            "event": "error",
            "message": error.what,
            "where": error.where,
            "fix": error.fix,
            "code": error.exit_code,
        }
        print(json.dumps(line))
    print(f"error: {error}", file=sys.stderr)
