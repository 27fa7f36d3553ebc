"""`tunesmith recipe import`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.cli.display import out
from tunesmith.cli.tables import aligned
from tunesmith.files import write_text


def show_import(file: Path, target: Path | None, *, as_json: bool) -> None:
    """Prints or writes the recipe, and says key by key what became of the other tool's file."""
    from tunesmith.recipe_import import import_recipe

    imported = import_recipe(file)
    if target is not None and target.exists():
        raise InputError("this file exists already; it is not overwritten", where=target)
    if as_json:
        keys = [asdict(key) for key in imported.keys]
        told = {"source": imported.source, "keys": keys, "defaults": imported.defaults, "yaml": imported.yaml}
        out(json.dumps(told))
        return
    table = aligned(
        [
            ["line", "key", "outcome", "became", "note"],
            *[[str(key.line), key.key, key.outcome, key.to or "", key.note] for key in imported.keys],
        ]
    )
    print("\n".join(table), file=sys.stderr)
    for text in imported.defaults:
        print(f"made explicit: {text}", file=sys.stderr)
    if target is not None:
        write_text(target, imported.yaml)
        out(f"wrote {target}")
    else:
        out(imported.yaml)
