"""Checks and trains on files of a given size, and prints time and peak memory of each.

    python bench/large_data.py [--rows 100000] [--gigabytes 1] [--out docs/results/large-data.md]

The rows are exchanges of about a hundred words made from the words of Python's language reference; one in a hundred is
doubled, and one nearly doubled. The model that is trained has two layers; tokenizer and template are the demo model's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.general_text import general_text
from tunesmith.models.demo import demo_model

HEAD = """# Large files

Written by `python bench/large_data.py`; two cores, no GPU. Memory is the peak resident size of the largest process so
far, of which about 0.6 GB is torch and transformers themselves, and most of the rest of a `train` is the logits of its
evaluations (49,152 words a token): what grows from the smaller file to the larger one is what the data take.

| job | rows | file | time | peak memory |
|---|---|---|---|---|
"""


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    words = sorted(set(re.findall(r"[A-Za-z]{2,12}", " ".join(general_text()[1]))))
    draw = random.Random(seed)
    kept: list[dict[str, str]] = []
    for number in range(count):
        chance = draw.random()
        if kept and chance < 0.01:
            yield dict(draw.choice(kept))
            continue
        if kept and chance < 0.02:
            twin = draw.choice(kept)
            yield {**twin, "completion": twin["completion"] + " indeed"}
            continue
        question = " ".join(draw.choices(words, k=draw.randint(15, 60)))
        row = {"prompt": f"{number}: {question}?", "completion": " ".join(draw.choices(words, k=draw.randint(20, 90)))}
        kept = [*kept[-200:], row]
        yield row


def write(path: Path, count: int | None = None, size: int | None = None) -> int:
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in rows(count or 10**9):
            file.write(json.dumps(row) + "\n")
            written += 1
            if size is not None and written % 1000 == 0 and file.tell() >= size:
                break
    return written


def small_model(directory: Path) -> Path:
    """The demo model's tokenizer around two layers of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    demo = demo_model()
    config = AutoConfig.from_pretrained(demo)
    config.num_hidden_layers = 2
    config.layer_types = None
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(demo).save_pretrained(directory)
    return directory


def measured(arguments: list[str], codes: tuple[int, ...] = (0,)) -> tuple[float, float]:
    """Seconds, and GB of the largest child so far: jobs are run in the order of their sizes."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "tunesmith", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode not in codes:
        raise SystemExit(f"tunesmith {' '.join(arguments)} ended with {done.returncode}")
    return time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/large-data.md"))
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="large-data-"))
    try:
        model, table = small_model(place / "model"), [HEAD]
        few, many = place / "few.jsonl", place / "many.jsonl"
        jobs = [
            (few, write(few, count=given.rows), ["data", "check", str(few)], "`data check`"),
            (few, given.rows, train(place, model, few), "`train`, 20 steps"),
            (many, write(many, size=int(given.gigabytes * 1e9)), train(place, model, many), "`train`, 20 steps"),
        ]
        for file, count, arguments, name in jobs:
            seconds, peak = measured(arguments)
            size = file.stat().st_size / 1e6
            table.append(f"| {name} | {count:,} | {size:,.0f} MB | {seconds:.0f} s | {peak:.2f} GB |\n")
            print(table[-1], end="", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(table), encoding="utf-8")
    finally:
        shutil.rmtree(place)


def train(place: Path, model: Path, data: Path) -> list[str]:
    recipe = place / f"{data.stem}.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {{train: {data}}}\ntrain: {{steps: 20, batch_size: 8}}\n"
        f"evaluate: {{rows: 8, max_new_tokens: 8}}\noutput: {place}/{data.stem}-run\n"
    )
    return ["train", str(recipe)]


if __name__ == "__main__":
    main()
