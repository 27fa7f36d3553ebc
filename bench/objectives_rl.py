"""Rewards that a program can check, raised from the demo model's own answers: facts as JSON with the asked keys.

    python bench/objectives_rl.py grpo              # or rloo, ppo
    python bench/objectives_rl.py grpo --steps 40 --output runs/json

Every prompt states three facts about somebody and asks for them as JSON with three keys. An answer is worth 0.5 when it
is JSON as a whole, and up to 0.5 more by the share of the keys that it has. Printed are the reward of the answers drawn
at each step, and the greedy answers to held-out prompts before and after with their interval.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.recipe_file import check_recipe

NAMES = "Ada Boris Chen Dora Emil Fatima Goran Hanna Ivan Jana Kofi Lena Marco Nadia Omar Petra Quentin Rosa".split()
CITIES = "Oslo Lima Cairo Prague Kyoto Quito Turin Dakar Perth Bergen Lyon Porto Accra Minsk".split()
JOBS = "baker pilot nurse farmer painter lawyer cook tailor miner singer".split()
KEYS = ["name", "city", "job"]


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    people = [(name, city, job) for name in NAMES for city in CITIES for job in JOBS]
    chosen = draw.sample(people, count)
    return [
        {
            "prompt": f"{name} lives in {city} and works as a {job}. Write this as a JSON object with the keys name, "
            "city and job, and nothing else."
        }
        for name, city, job in chosen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["grpo", "rloo", "ppo"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--answers", type=int, default=8, help="answers a prompt")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=None)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = {}
        for name, count, seed in (("train", 400, 1), ("test", asked.held_out, 2)):
            places[name] = Path(scratch) / f"{name}.jsonl"
            rows = prompts(count, seed)
            places[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        reward = [{"kind": "json", "weight": 0.5}, {"kind": "json", "keys": KEYS, "weight": 0.5}]
        recipe = {
            "model": "demo",
            "data": {"train": str(places["train"]), "test": str(places["test"])},
            "method": {"kind": "lora", "rank": 16},
            "objective": {"kind": asked.kind, "reward": reward, "max_new_tokens": 48, "group_size": asked.answers},
            "train": {
                "steps": asked.steps,
                "batch_size": asked.prompts,
                "learning_rate": asked.rate,
                "schedule": "constant",
                "checkpoint_every": "off",
            },
            "evaluate": {"rows": asked.held_out, "forgetting": "auto"},
            "seed": asked.seed,
            "output": asked.output or str(Path(scratch) / "run"),
        }
        run = finetune(check_recipe(recipe, "bench"), watcher=Watcher(event=_show))
        report = run.report or {}
        measured = report["measured"]
        print(report["sentence"])
        print(f"{measured['train_seconds']:.0f} s of training, {measured['peak_bytes'] / 2**20:.0f} MiB at the peak")
        for sample in report["samples"].get("best", [])[:2]:
            print(f"base : {sample['base']!r}\ntuned: {sample['tuned']!r}")


def _show(event: dict) -> None:
    if event["event"] == "rollout":
        kl = event.get("kl")
        print(
            f"step {event['step']:3d}  reward {event['reward']:.3f}  kl {kl if kl is None else round(kl, 3)}  "
            f"entropy {event['entropy']:.3f}  tokens {event['length']:.1f}  cut {event['cut']:.2f}",
            flush=True,
        )
    elif event["event"] in ("warning", "note"):
        print(event["message"], flush=True)


if __name__ == "__main__":
    main()
