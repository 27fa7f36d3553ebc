"""How fast a new head should learn beside adapters: banking77 with several factors on its learning rate.

    python bench/head_rate.py DATA --encoder DIRECTORY [--steps 120] [--kinds full --rate 3e-4 --factors 10 100]

DATA holds `cls_banking77`. Prints accuracy and validation loss for LoRA and bottleneck adapters, or the methods named,
with each factor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tunesmith.pipeline.finetune import finetune
from tunesmith.recipe import Recipe

FACTORS = (1.0, 4.0, 10.0, 30.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--kinds", nargs="+", default=["lora", "adapter"])
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of everything else")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS)
    given = parser.parse_args()
    files = given.data / "cls_banking77"
    with tempfile.TemporaryDirectory() as directory:
        for kind in given.kinds:
            for factor in given.factors:
                run = finetune(Recipe.model_validate(_recipe(given, files, kind, factor, Path(directory))))
                report = json.loads((run.path / "report.json").read_text())
                found = report["metrics"][0]["tuned"], report["curves"]["validation"][-1][1]
                print(f"{kind:8} x {factor:4g}   accuracy {found[0]:.3f}   validation loss {found[1]:.3f}", flush=True)


def _recipe(given: argparse.Namespace, files: Path, kind: str, factor: float, directory: Path) -> dict[str, object]:
    return {
        "model": given.encoder,
        "data": {
            "train": str(files / "train.csv"),
            "test": str(files / "test.csv"),
            "validation": 0.05,
            "checks": False,
            "duplicates": "keep",
            "overlap": "keep",
        },
        "objective": {"kind": "classify", "head_rate": factor},
        "method": kind,
        "train": {"steps": given.steps, "batch_size": 32, "learning_rate": given.rate},
        "evaluate": {"rows": 1000, "samples": 0},
        "output": str(directory / f"{kind}-{factor:g}"),
    }


if __name__ == "__main__":
    main()
