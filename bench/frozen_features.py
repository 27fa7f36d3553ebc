"""How much faster a head trains on features that are kept than through the frozen trunk, on the same rows.

Runs the same job twice, through the command line in processes of their own, and compares seconds of training (features
included). The other side is the same method with the trunk run in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = {
    "features kept": "",
    "trunk in every step": "from tunesmith.methods import HeadOnly; HeadOnly.trunk_is_frozen = False; ",
}


def seconds(recipe: dict[str, object], before: str, place: Path, name: str) -> tuple[float, float]:
    """Seconds from the model's loading to the last step, and the last loss."""
    path, out = place / f"{name}.yaml".replace(" ", "-"), place / name.replace(" ", "-")
    path.write_text(json.dumps({**recipe, "output": str(out)}))
    code = (
        f"{before}import time; from tunesmith.recipe_file import read_recipe; from tunesmith.pipeline.finetune import "
        "finetune; from tunesmith.pipeline.work import Watcher; at = {}\n"
        "def plan(plan): at['start'] = time.perf_counter()\n"
        "def event(event):\n    if event['event'] == 'trained' or 'start' not in at: at['end'] = time.perf_counter()\n"
        "def progress(label, done, total):\n    if label == 'loading the model': at['start'] = time.perf_counter()\n"
        f"finetune(read_recipe({str(path)!r}), watcher=Watcher(progress=progress, event=event))\n"
        "print('SECONDS', at['end'] - at['start'])"
    )
    environment = {**os.environ, "TUNESMITH_DATA_CACHE": str(place / f"cache-{time.time_ns()}")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    return float(done.stdout.split("SECONDS")[1]), losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", help="rows with labels")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        lines = Path(given.data).read_text(encoding="utf-8").splitlines(keepends=True)
        data = place / f"rows{Path(given.data).suffix}"
        data.write_text("".join(lines[: given.rows + 1]), encoding="utf-8")
        recipe = {
            "model": given.model,
            "data": {"train": str(data), "checks": False, "duplicates": "keep"},
            "objective": {"kind": "classify"},
            "method": {"kind": "head", "solver": "gradient"},
            "train": {"epochs": given.epochs, "batch_size": given.batch_size, "checkpoint_every": "off"},
            "evaluate": "off",
        }
        took = {}
        for name, before in SIDES.items():
            took[name], loss = seconds(recipe, before, place, name)
            print(f"{name}: {took[name]:.1f} s, last loss {loss:.4f}", flush=True)
    kept, through = took.values()
    print(f"{through / kept:.1f} times faster with features kept")


if __name__ == "__main__":
    main()
