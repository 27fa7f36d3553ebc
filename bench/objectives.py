"""Preference objectives and reward models on the demo model: what held-out pairs say before and after.

    python bench/objectives.py DATA [--objective dpo] [--steps 40] [--rate 1e-4] [--write]

DATA holds `pref_llms_from_scratch`. Every objective gets the same pairs, steps and rank; KTO gets each pair as two
rows. What is finished stays in `runs/objectives`; `--write` puts the table of all that is there into
`docs/results/objectives.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from tunesmith.pipeline.finetune import Watcher, finetune
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run

WORK, OUT = Path("runs/objectives"), Path("docs/results/objectives.md")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "dpo, ipo": {"kind": "dpo", "variant": "ipo"},
    "dpo, likelihood 1": {"kind": "dpo", "nll_weight": 1},
    "simpo": {"kind": "simpo"},
    "orpo": {"kind": "orpo"},
    "orpo, rate 1e-3": {"kind": "orpo", "rate": 1e-3},
    "orpo, beta 1, rate 1e-3": {"kind": "orpo", "beta": 1, "rate": 1e-3},
    "kto": {"kind": "kto"},
    "reward": {"kind": "reward"},
}
HEAD = """# Preferences on the demo model

Written by `python bench/objectives.py DATA --write`: LoRA on SmolLM2-135M-Instruct, {steps} steps of 8 pairs of
`pref_llms_from_scratch` (polite answers chosen, impolite ones rejected; KTO: 16 answers), learning rate {rate:g}
unless the row says otherwise, 110 held-out pairs. Gained more: in what share of pairs the better answer became likelier
by more than the worse did; 0.5 before, by definition; of a reward model, whose number is the larger. Likelier:
in what share the better answer is the likelier by the token, before and after. In brackets the 95 % paired bootstrap
interval of the difference. Margin is in nats a token (a reward model: of the two numbers; KTO, which has no pairs: the
mean log-likelihood of good answers and minus that of bad ones). A rising perplexity of chosen answers means that they
became less likely too. Forgetting is the change of perplexity on general text.

| objective | gained more | likelier | margin | perplexity of chosen | forgetting |
|---|---|---|---|---|---|
"""
NOTES = """
What it teaches. DPO moves what it is asked to move, which answer gained, and hardly which of the two is likelier: the
margin in likelihood that the base has is larger than what 40 steps change. SimPO, which has no reference, does the
opposite: the likelier answer changes in a ninth of the pairs, and better answers become less likely by the token. ORPO
mostly learns the answers (their perplexity falls by a third at ten times the rate); at its usual weight the odds ratio
decides little, with weight 1 both accuracies rise, the first beyond its interval. A new head on the last token, all
that a reward model begins with, is right in 62 % of pairs after 320 of them.

Policies (GRPO, RLOO, PPO) have a [page of their own](rewards.md), and so has [pretraining](pretrain.md).

The curves, in the objective's own loss; those of the training rows are means over the ten steps before. Every run's
page is `runs/objectives/NAME/report.html`.

| objective | rows | {steps} |
|---|---|{bars}
"""


def rows_of(data: Path) -> tuple[Path, Path]:
    """The pairs, and each as two labelled rows."""
    pairs = json.loads((data / "pref_llms_from_scratch" / "instruction-data-with-preference.json").read_text())
    WORK.mkdir(parents=True, exist_ok=True)
    kept = [{name: row[name] for name in ("instruction", "input", "chosen", "rejected")} for row in pairs]
    (WORK / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    single = []
    for row in kept:
        prompt = f"{row['instruction']}\n\n{row['input']}".strip()
        single += [
            {"prompt": prompt, "completion": row[name], "label": name == "chosen"} for name in ("chosen", "rejected")
        ]
    (WORK / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    return WORK / "pairs.jsonl", WORK / "labelled.jsonl"


def finished(name: str, objective: dict[str, Any], rows: Path, steps: int, rate: float) -> Run:
    output, objective = WORK / name.replace(", ", "-").replace(" ", "-"), dict(objective)
    if (output / "report.json").is_file():
        return Run.open(output)
    values = {
        "model": "demo",
        "data": {"train": str(rows), "test": 0.1, "validation": 0.05, "checks": False},
        "train": {
            "learning_rate": objective.pop("rate", rate),
            "steps": steps,
            "batch_size": 8 if objective["kind"] != "kto" else 16,
            "evaluate_every": steps // 4,
        },
        "objective": objective,
        "evaluate": {"rows": 110, "memorisation": "off"},
        "output": str(output),
    }
    return finetune(check_recipe(values, name), resume=True, watcher=Watcher())


def row_of(name: str, run: Run) -> str:
    report = run.report or {}
    metrics = {entry["name"]: entry for entry in report["metrics"]}
    gained = metrics.get("reward_accuracy")
    likelier = metrics.get("preference_accuracy")
    if report["objective"] == "reward":
        gained, likelier = likelier, None
    cells = [
        name,
        _told(gained, "{tuned:.3f}"),
        _told(likelier, "{base:.3f} → {tuned:.3f}"),
        _told(metrics.get("margin"), "{base:.2f} → {tuned:.2f}"),
        "–" if "perplexity" not in metrics else "{base:.2f} → {tuned:.2f}".format(**metrics["perplexity"]),
    ]
    change = report["forgetting"].get("change")
    cells.append("–" if change is None else f"{change:+.1%}")
    return f"| {' | '.join(cells)} |"


def curves_of(name: str, run: Run) -> list[str]:
    """Two rows of the table of curves: the loss on training rows and on held-out ones."""
    events = run.events()
    held_out = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
    steps = [(event["step"], event["loss"]) for event in events if event["event"] == "step"]
    trained = [mean(loss for step, loss in steps if at - 10 < step <= at) for at in sorted(held_out)]
    rows = (("training", trained), ("held out", [held_out[at] for at in sorted(held_out)]))
    return [f"| {name} | {what} | {' | '.join(f'{value:.3f}' for value in values)} |" for what, values in rows]


def _told(entry: dict[str, Any] | None, form: str) -> str:
    return "–" if entry is None else f"{form} ({{low:+.3f}} … {{high:+.3f}})".format(**entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--objective", action="append")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of them all")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    pairs, single = rows_of(given.data)
    lines, curves = [], []
    for name, objective in OBJECTIVES.items():
        if given.objective and name not in given.objective:
            continue
        run = finished(name, objective, single if objective["kind"] == "kto" else pairs, given.steps, given.rate)
        lines.append(row_of(name, run))
        curves += curves_of(name, run)
        print(lines[-1], flush=True)
    if given.write:
        at = [given.steps // 4 * part for part in range(1, 5)]
        notes = NOTES.format(steps=" | ".join(f"step {step}" for step in at), bars="---|" * len(at))
        OUT.write_text(
            HEAD.format(steps=given.steps, rate=given.rate)
            + "\n".join(lines)
            + "\n"
            + notes
            + "\n".join(curves)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
