"""Measures the ladder on two real tasks and the facts on a third, with the demo model on the CPU.

    python bench/ladder.py DATA [--task sql|summaries|facts] [--write]

DATA is a directory with `sql_wikisql_mlx`, `sum_scitldr` and `corpus_peps`. Recipes are in `bench/ladders/`, answers
and runs go to `runs/ladder/`; what was answered or trained before is not done again, so that a killed one goes on. A
task takes 15 to 25 minutes on one core without a GPU. `--small` asks four rows and trains three steps, to see it run.
`--write` writes what is there to docs/results/ladder.md; other sections stay there as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from first_tasks import with_data
from tunesmith.cli.ladder import ladder_lines
from tunesmith.files import write_lines, write_text

HERE = Path(__file__).parent
TASKS = {
    "sql": "Text to SQL (WikiSQL)",
    "summaries": "One-sentence summaries (SciTLDR)",
    "facts": "Facts (headers of Python's enhancement proposals)",
}
HEAD = """# The ladder

Public data, the demo model (SmolLM2-135M-Instruct), LoRA; written by `python bench/ladder.py DATA --write`, recipes in
`bench/ladders/`. One core without a GPU. Every way of asking answers the same held-out rows, greedily; intervals are
95 % bootstraps over rows, for one seed. Latency is of one question at a time; costs are the tokens at the prices that
come with Tunesmith, without training. What each setting means stands in [the ladder's page](../ladder.md).
"""
OPENING = 1500
"""Characters of a proposal that are searched: its headers and abstract. The whole of them would take a sentence encoder
a quarter of an hour on one core."""
HEADERS = {
    "Created": (
        "When was PEP {number} created?",
        "What is the date of creation of Python Enhancement Proposal {number}?",
    ),
    "Author": ("Who wrote PEP {number}?", "Name the author of Python Enhancement Proposal {number}."),
    "Title": ("What is the title of PEP {number}?", "What is Python Enhancement Proposal {number} called?"),
}
"""Of each header the question that is trained on and the one that is only asked."""


def write_facts(data: Path, directory: Path, proposals: int) -> None:
    """A corpus of openings, and questions about the headers of some of them.

    Args:
        proposals: how many are asked about.
    """
    corpus, facts = [], []
    for line in (data / "corpus_peps" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        number = re.match(r"PEP: (\d+)", text)
        if number is None:
            continue
        corpus.append({"text": text[:OPENING]})
        for header, (question, other) in HEADERS.items() if len(corpus) <= proposals else ():
            found = re.search(rf"^{header}: *(.+)$", text, re.MULTILINE)
            if found is not None:
                answer = re.split(r" <|,", found[1])[0].strip() if header == "Author" else found[1].strip()
                facts.append(
                    {
                        "question": question.format(number=number[1]),
                        "answer": answer,
                        "paraphrases": [other.format(number=number[1])],
                    }
                )
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("facts", facts)):
        write_lines(directory / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def measure(task: str, data: Path, root: Path, small: bool) -> None:
    """Runs `tunesmith advise --measure` on a task's recipe."""
    root.mkdir(parents=True, exist_ok=True)
    if task == "facts":
        write_facts(data, root / "facts-data", 6 if small else 32)
        data = root / "facts-data"
    recipe = with_data(yaml.safe_load((HERE / "ladders" / f"{task}.yaml").read_text()), data)
    recipe["output"], recipe["ladder"]["output"] = str(root / f"{task}-run"), str(root / task)
    if small:
        recipe["evaluate"]["rows"] = 4
        recipe["ladder"] |= {"latency_rows": 1, "shots_rows": 2, "thought_tokens": 16, "chain_tokens": 16}
        recipe["train"] |= {"steps": 3}
        if task == "facts":
            recipe["ladder"]["facts"] |= {"questions": 3, "epochs": 1}
    path = root / f"{task}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "tunesmith", "advise", "--measure", str(path)], check=False)
    if done.returncode not in (0, 3):  # 3: no rung reaches the target
        raise SystemExit(done.returncode)


def section(task: str, report: dict[str, Any]) -> str:
    command = f"python bench/ladder.py DATA --task {task}"
    lines = [f"## {TASKS[task]}", "", f"`{command}`", ""]
    lines += [report["answer"]["sentence"] if report["rungs"] else report["facts"]["sentence"], ""]
    return "\n".join([*lines, "```text", *(line.rstrip() for line in ladder_lines(report)), "```", ""])


def published(page: Path) -> dict[str, str]:
    """The sections that a page has by task; they stay where a task is not measured anew."""
    if not page.is_file():
        return {}
    parts = page.read_text(encoding="utf-8").split("\n## ")[1:]
    return {task: f"## {part}" for task, title in TASKS.items() for part in parts if part.startswith(title)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", choices=[*TASKS], help="only this one")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/results/ladder.md"))
    given = parser.parse_args()
    root = Path("runs/ladder-small" if given.small else "runs/ladder")
    for task in [given.task] if given.task else TASKS:
        measure(task, given.data, root, given.small)
    found = {task: root / task / "ladder.json" for task in TASKS}
    reports = {task: json.loads(path.read_text()) for task, path in found.items() if path.is_file()}
    sections = published(given.out) | {task: section(task, report) for task, report in reports.items()}
    text = "\n".join([HEAD, *(sections[task] for task in TASKS if task in sections)])
    if given.write:
        write_text(given.out, text)
        print(given.out)


if __name__ == "__main__":
    main()
