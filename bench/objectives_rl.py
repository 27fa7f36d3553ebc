"""Rewards that a program can check, raised from the demo model's own answers: facts as JSON with the asked keys.

    python bench/objectives_rl.py --write           # grpo, rloo and ppo, about half an hour each on one core
    python bench/objectives_rl.py grpo --steps 40   # one of them

Every prompt states three facts about somebody and asks for them as JSON with three keys. An answer is worth 0.5 when it
is JSON as a whole, and up to 0.5 more by the share of the keys that it has. All get as many answers a step: PPO one to
each of more prompts. What is finished stays in `runs/objectives-rl`, and what was stopped is gone on with; `--write`
puts the curves of all that is there with these settings into `docs/results/rewards.md`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

WORK, OUT = Path("runs/objectives-rl"), Path("docs/results/rewards.md")
NAMES = "Ada Boris Chen Dora Emil Fatima Goran Hanna Ivan Jana Kofi Lena Marco Nadia Omar Petra Quentin Rosa".split()
CITIES = "Oslo Lima Cairo Prague Kyoto Quito Turin Dakar Perth Bergen Lyon Porto Accra Minsk".split()
JOBS = "baker pilot nurse farmer painter lawyer cook tailor miner singer".split()
KEYS = ["name", "city", "job"]
KINDS = ("grpo", "rloo", "ppo")
HEAD = """# Rewards that a program can check

Written by `python bench/objectives_rl.py --steps {steps} --prompts {prompts} --answers {answers} --rate {rate:g} \
--held-out {held_out} --seed {seed} --write`.
The demo model (SmolLM2-135M-Instruct) is told three facts about somebody and asked for them as a JSON object with three
keys, and nothing else. An answer is worth 0.5 when it is JSON as a whole, and up to 0.5 more by the share of the keys
that it has. LoRA of rank 16, 48 tokens at most. A step of GRPO and RLOO is {prompts} prompts with {answers} answers
each, one of PPO {all} prompts with one answer each and {passes} optimizer steps on them. Judged are greedy answers to
{held_out} held-out prompts, with the 95 % interval of the difference; one seed each. The distance from the start is in
nats an answer, at the last answers drawn.

| objective | optimizer steps | reward before | after | difference | perplexity on general text | nats from the start |
|---|---|---|---|---|---|---|
"""


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


PASSES = 2
"""Steps of PPO on the same answers."""


def recipe_of(kind: str, asked: argparse.Namespace) -> dict[str, Any]:
    WORK.mkdir(parents=True, exist_ok=True)
    places = {}
    for name, count, seed in (("train", 400, 1), ("test", asked.held_out, 2)):
        places[name] = WORK / f"{name}-{count}.jsonl"
        places[name].write_text("".join(json.dumps(row) + "\n" for row in prompts(count, seed)), encoding="utf-8")
    reward = [{"kind": "json", "weight": 0.5}, {"kind": "json", "keys": KEYS, "weight": 0.5}]
    grouped, passes = kind != "ppo", 1 if kind != "ppo" else PASSES
    steps, size = asked.steps * passes, asked.prompts if grouped else asked.prompts * asked.answers
    return {
        "model": "demo",
        "data": {"train": str(places["train"]), "test": str(places["test"])},
        "method": {"kind": "lora", "rank": 16},
        "objective": {
            "kind": kind,
            "reward": reward,
            "max_new_tokens": 48,
            "passes": passes,
            **({"group_size": asked.answers} if grouped else {}),
        },
        "train": {
            "steps": steps,
            "batch_size": size,
            "learning_rate": asked.rate,
            "schedule": "constant",
            "checkpoint_every": 5,
        },
        "evaluate": {"rows": asked.held_out, "forgetting": "auto"},
        "seed": asked.seed,
        "output": str(WORK / _name(kind, asked)),
    }


def _name(kind: str, asked: argparse.Namespace) -> str:
    sizes = (asked.steps, asked.prompts, asked.answers, f"{asked.rate:g}", asked.held_out, asked.seed)
    return "-".join(map(str, (kind, *sizes)))


def page(asked: argparse.Namespace) -> str:
    done = {kind: Run(WORK / _name(kind, asked)) for kind in KINDS}
    done = {kind: run for kind, run in done.items() if run.path.is_dir() and run.report is not None}
    text = HEAD.format(**vars(asked), all=asked.prompts * asked.answers, passes=PASSES)
    curves = {}
    for kind, run in done.items():
        report = run.report or {}
        [metric] = [one for one in report["metrics"] if one["name"] == "reward"]
        curves[kind] = [event for event in run.events() if event["event"] == "rollout"]
        forgotten = (report.get("forgetting") or {}).get("change")
        steps = sum(event["event"] == "step" for event in run.events())
        text += (
            f"| {kind} | {steps} | {metric['base']:.3f} | {metric['tuned']:.3f} "
            f"| {metric['difference']:+.3f} ({metric['low']:+.3f} to {metric['high']:+.3f}) "
            f"| {'' if forgotten is None else f'{forgotten:+.1%}'} | {curves[kind][-1].get('kl', 0.0):.1f} |\n"
        )
    text += "\nReward of the answers drawn, rollout by rollout:\n\n"
    text += f"| rollout | {' | '.join(curves)} |\n|---|{'---|' * len(curves)}\n"
    for at in range(max(map(len, curves.values()), default=0)):
        cells = [f"{curve[at]['reward']:.3f}" if at < len(curve) else "" for curve in curves.values()]
        text += f"| {at + 1} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="kind", help="grpo, rloo or ppo; all by default")
    parser.add_argument("--steps", type=int, default=20, help="rollouts")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--answers", type=int, default=8, help="answers a prompt")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.kinds) - set(KINDS)):
        parser.error(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    for kind in asked.kinds:
        print(f"--- {kind}", flush=True)
        run = finetune(check_recipe(recipe_of(kind, asked), "bench"), resume=True, watcher=Watcher(event=_show))
        report = run.report or {}
        measured = report["measured"]
        print(report["sentence"])
        print(f"{measured['train_seconds']:.0f} s of training, {measured['peak_bytes'] / 2**20:.0f} MiB at the peak")
        for sample in report["samples"].get("best", [])[:2]:
            print(f"base : {sample['base']!r}\ntuned: {sample['tuned']!r}")
    text = page(asked)
    print(text)
    if asked.write:
        OUT.write_text(text, encoding="utf-8")


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
