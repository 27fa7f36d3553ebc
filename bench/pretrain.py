"""Continued pretraining of the demo model on documents about Python (PEPs), and what general text pays for it.

    python bench/pretrain.py DATA [--steps 24] [--block 512] [--only full] [--short] [--write]

DATA holds `corpus_peps` (documents) and `instruct_llms_from_scratch` (general rows, from whose answers the replayed
text is made). Every way gets the same steps; held out are whole documents. What is finished stays in `runs/pretrain`,
so that the command goes on where it stopped; `--write` puts all that is there into `docs/results/pretrain.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from methods import slug
from tunesmith.data.general_text import general_text
from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

WORK, OUT = Path("runs/pretrain"), Path("docs/results/pretrain.md")
LONGEST = 16_000
"""Characters of a document. Longer ones are left out of this comparison, whole."""
SHORT, SHORT_GENERAL = 7_000, 20_000
"""Characters of a document, and of all general text, in the short version."""


def ways(general: str) -> dict[str, dict[str, Any]]:
    replay = {"data": {"replay": {"path": general, "share": 0.25}}}
    full, lora = {"method": "full"}, {"method": "lora"}
    return {
        "full": {**full, "train": {"learning_rate": 1e-4}},
        "full, replay 25 %": {**full, **replay, "train": {"learning_rate": 1e-4}},
        "full, a fifth of the rate": {**full, "train": {"learning_rate": 2e-5}},
        "lora": {**lora, "train": {"learning_rate": 1e-3}},
        "lora, replay 25 %": {**lora, **replay, "train": {"learning_rate": 1e-3}},
    }


def texts(data: Path, longest: int) -> dict[str, Path]:
    """Files of documents for this comparison, all of the corpus up to a length, in one file; and of general rows."""
    WORK.mkdir(parents=True, exist_ok=True)
    found = {"peps": WORK / f"peps-{longest}.jsonl", "measured": WORK / "measured.jsonl"}
    files = [data / "corpus_peps" / f"{name}.jsonl" for name in ("train", "valid")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    kept = [{"text": row["text"]} for row in rows if len(row["text"]) <= longest]
    found["peps"].write_text("".join(json.dumps(row) + "\n" for row in kept))
    _, passages = general_text(SHORT_GENERAL)
    found["measured"].write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    rows = json.loads((data / "instruct_llms_from_scratch" / "instruction-data.json").read_text())
    pages = [rows[at : at + 20] for at in range(0, len(rows), 20)]
    said = ["\n\n".join(f"{r['instruction']} {r['input']}\n{r['output']}" for r in page) for page in pages]
    found["general"] = WORK / "general.jsonl"
    found["general"].write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    return found


def finished(name: str, files: dict[str, Path], way: dict[str, Any], given: Any) -> Run:
    output = WORK / f"{slug(name)}-{given.steps}-{given.block}{'-short' * given.short}"
    recipe = {
        "model": "demo",
        "objective": "pretrain",
        "data": {
            "train": str(files["peps"]),
            "test": 0.2,
            "max_length": given.block,
            "checks": False,
            **way.get("data", {}),
        },
        "method": way["method"],
        "train": {"steps": given.steps, "batch_size": 8, "checkpoint_every": "off", **way["train"]},
        "evaluate": {"samples": 0, **({"forgetting": str(files["measured"])} if given.short else {})},
        "output": str(output),
    }
    run = finetune(check_recipe(recipe, "bench"), resume=True)
    print(row_of(name, run), flush=True)
    return run


def row_of(name: str, run: Run) -> str:
    report = run.report or {}
    found = {entry["name"]: entry for entry in report["metrics"]}
    perplexity, bits = found["perplexity"], found["bits_per_byte"]
    forgot, measured = report["forgetting"], report["measured"]
    rate = run.read("plan.json")["learning_rate"]
    cells = [
        name,
        f"{rate:.0e}",
        f"{perplexity['base']:.2f} → {perplexity['tuned']:.2f} ({perplexity['low']:+.2f} … {perplexity['high']:+.2f})",
        f"{bits['base']:.4f} → {bits['tuned']:.4f} ({bits['low']:+.4f} … {bits['high']:+.4f})",
        f"{forgot['change']:+.1%} ({forgot['low']:+.1%} … {forgot['high']:+.1%})",
        f"{measured['train_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """# Continued pretraining

Written by `python bench/pretrain.py DATA {arguments}--write`: SmolLM2-135M-Instruct on Python Enhancement
Proposals of up to {longest:,} characters ({documents} documents, {blocks} blocks of {block} tokens, {full:.1%} full),
{steps} steps of 8 blocks, {tokens:,} target tokens. Held out are {held} whole documents. Replay is text of general
questions and answers, a quarter of an epoch's blocks. General text is the language reference that Python carries.
Differences have 95 % paired bootstrap intervals over documents or passages. One seed, two cores without a GPU. That
general text is about Python as the documents are: where it gains, `evaluate.forgetting` with other text would say more.

| way | rate | perplexity per token | bits per byte | perplexity of general text | seconds |
|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--only", action="append")
    parser.add_argument("--short", action="store_true", help="short documents and less general text: minutes")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    longest = SHORT if given.short else LONGEST
    files = texts(given.data, longest)
    known = ways(str(files["general"]))
    runs = {name: finished(name, files, known[name], given) for name in given.only or known}
    if given.write:
        first = next(iter(runs.values()))
        data = (first.report or {})["data"]
        targets = sum(event["targets"] for event in first.events() if event["event"] == "step")
        head = HEAD.format(
            arguments=f"--steps {given.steps} --block {given.block} {'--short ' * given.short}",
            longest=longest,
            documents=data["rows_used"],
            blocks=data["blocks"]["count"],
            full=data["blocks"]["full"],
            block=given.block,
            steps=given.steps,
            tokens=targets,
            held=data["test"]["rows"],
        )
        OUT.write_text(head + "\n".join(row_of(name, run) for name, run in runs.items()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
