"""Peak memory of PPO against LoRA's supervised fine-tuning at the same batch and lengths, on the demo model.

    python bench/ppo_memory.py [--steps 4] [--rows 8] [--prompt 96] [--answer 96] [--write]

Three jobs, each a process of its own, whose peak is the operating system's own count (`ru_maxrss` of the process that
ended): SFT; PPO with a reward that is a function; PPO with a reward model, trained before over the same base. Nothing
is evaluated. Rows of SFT have the prompts of PPO and answers as long as PPO's are cut at; the tokens of the largest
step and of PPO's answers are printed, so that it can be seen whether they were as long.
PPO's peak may be 1.4 times that of SFT at most: otherwise the exit code is 1. About six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST = 1.4
OUT = Path("docs/results/ppo-memory.md")
REWARD = "def score(prompt, answer, references):\n    return answer.count('e') / (1 + len(answer))\n"
FILLER = "Here is one more of the many facts about the old house at the end of the street. "


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files(place: Path, asked: argparse.Namespace) -> dict[str, str]:
    """Prompts of about as many tokens as asked for, the same with answers, and pairs of answers."""
    words = (FILLER * (asked.prompt // 8 + 8)).split()

    def prompt(number: int) -> str:
        # The template takes some thirty tokens of its own.
        return f"{number}. " + " ".join(words[: max(4, asked.prompt - 50)]) + " Tell a very long story about it."

    numbers = range(asked.rows * asked.steps)
    answer = " ".join(words[: asked.answer - 4])
    place.joinpath("reward.py").write_text(REWARD, encoding="utf-8")
    return {
        "prompts": written(place / "prompts.jsonl", [{"prompt": prompt(at)} for at in numbers]),
        "rows": written(place / "rows.jsonl", [{"prompt": prompt(at), "completion": answer} for at in numbers]),
        "pairs": written(
            place / "pairs.jsonl", [{"prompt": prompt(at), "chosen": "Yes.", "rejected": "No."} for at in numbers]
        ),
        "function": f"{place / 'reward.py'}:score",
    }


def job(directory: Path, asked: argparse.Namespace, data: str, objective: dict[str, Any]) -> dict[str, Any]:
    """Trains in a process of its own; its peak in bytes, and mean tokens of an answer where it gives them itself."""
    recipe = {
        "model": "demo",
        "data": {"train": data},
        "method": {"kind": "lora"},
        "objective": objective,
        "train": {"steps": asked.steps, "batch_size": asked.rows, "micro_batch": asked.rows, "checkpoint_every": "off"},
        "evaluate": "off",
        "output": str(directory),
    }
    path = directory.with_suffix(".json")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "tunesmith", "train", str(path)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{path} failed")
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    lengths = [event["length"] for event in events if event["event"] == "rollout"]
    steps = [event for event in events if event["event"] == "step"]
    return {
        "peak": usage.ru_maxrss * 1024,
        "tokens": max(event["tokens"] for event in steps),
        "length": sum(lengths) / len(lengths) if lengths else None,
    }


def page(asked: argparse.Namespace, found: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """The page, and the largest ratio to SFT."""
    base = found["sft"]["peak"]
    ratios = {name: one["peak"] / base for name, one in found.items()}
    lines = [
        "# Peak memory of PPO",
        "",
        f"`python bench/ppo_memory.py --steps {asked.steps} --rows {asked.rows} --prompt {asked.prompt} --answer "
        f"{asked.answer}`: SmolLM2-135M, LoRA of rank 16, {asked.rows} rows at a time, nothing evaluated. Each job is "
        "a process of its own; its peak is the operating system's count from start to end.",
        "",
        "| | peak of the process (MB of 10^6 bytes) | of SFT's | tokens of the largest step | tokens an answer |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {one['peak'] / 1e6:.0f} | {ratios[name]:.2f} | {one['tokens']} | "
            f"{'' if one['length'] is None else round(one['length'], 1)} |"
            for name, one in found.items()
        ),
        "",
    ]
    return "\n".join(lines), max(ratios.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--answer", type=int, default=96)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        given = files(place, asked)
        ppo = {"kind": "ppo", "max_new_tokens": asked.answer, "passes": 2}
        found = {"sft": job(place / "sft", asked, given["rows"], {"kind": "sft"})}
        print(f"sft: {found['sft']['peak'] / 1e6:.0f} MB", flush=True)
        by_function = {**ppo, "reward": {"kind": "function", "path": given["function"]}}
        found["ppo, reward by a function"] = job(place / "ppo", asked, given["prompts"], by_function)
        job(place / "reward", asked, given["pairs"], {"kind": "reward"})
        by_model = {**ppo, "reward": {"kind": "model", "path": str(place / "reward")}}
        found["ppo, reward model over the same base"] = job(place / "judged", asked, given["prompts"], by_model)
    text, largest = page(asked, found)
    print(text)
    if asked.write:
        OUT.write_text(text, encoding="utf-8")
    if largest > MOST:
        raise SystemExit(f"PPO's peak is {largest:.2f} times that of SFT, more than {MOST}")


if __name__ == "__main__":
    main()
