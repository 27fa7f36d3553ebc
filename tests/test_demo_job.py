"""The main job on the real 135 M demo model, short: it learns the house style, and PEFT loads what it learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.cli.train import demo_recipe
from tunesmith.data.stdlib_docstrings import write_demo_data
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.loaded import load
from tunesmith.recipe_file import check_recipe

pytestmark = pytest.mark.demo


def test_the_demo_gets_better_and_peft_loads_it(demo_directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    write_demo_data(tmp_path / "data")
    values = demo_recipe(tmp_path / "data", tmp_path / "run").model_dump(mode="json")
    values["train"] |= {"steps": 8, "batch_size": 8, "evaluate_every": "off", "checkpoint_every": "off"}
    values["evaluate"] |= {"rows": 8, "max_new_tokens": 24, "forgetting": "off", "metrics": ["rougeL"]}
    values["data"]["validation"] = None
    run = finetune(check_recipe(values, "demo"))
    report = run.report
    assert report is not None
    perplexity = next(entry for entry in report["metrics"] if entry["name"] == "perplexity")
    assert perplexity["tuned"] < 0.5 * perplexity["base"] and perplexity["high"] < 0
    assert report["parameters"]["total"] - report["parameters"]["trainable"] == 134_515_008

    base = AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, run.path / "adapter").eval()
    ours = load(run.path, dtype="bf16")
    prompt = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356]])
    with torch.no_grad():
        found, expected = ours(prompt).logits.float(), theirs(prompt).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
