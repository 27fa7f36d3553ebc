"""A DPO step here and in TRL's DPOTrainer: the same pairs, model and LoRA, in turn; and what sharing prompts gains.

    python bench/dpo_step.py [--pairs 8] [--steps 6] [--part trl|sharing]

The demo model in bf16 with LoRA of rank 16 on all linear layers. TRL keeps reference log-probabilities too
(`precompute_ref_log_probs`), so that both sides do one forward and one backward pass. Prints medians, the ratio of each
round, and for several lengths of prompt and answer how much of the bound by counted tokens sharing reaches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tunesmith.batch import Example, answers_behind, pack
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.models.demo import demo_model
from tunesmith.models.load import load_model
from tunesmith.objectives import Dpo
from tunesmith.objectives.preference import REFERENCE
from tunesmith.train.loop import step
from tunesmith.train.precision import Precision

SHAPES = ((256, 64), (128, 128), (64, 192), (384, 32))


def pairs(count: int, prompt: int, answer: int) -> list[Example]:
    """Random tokens: what they say does not matter for time."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 40_000, (prompt + 2 * answer,), generator=generator)
        weights = torch.tensor([0.0] * prompt + [1.0] * (2 * answer))
        tensors = {"target_weights": weights, REFERENCE: torch.full((2 * answer,), -8.0)}
        scopes: Any = {"target_weights": "token", REFERENCE: "target"}
        found.append(Example(ids, tensors, scopes, None, answers_behind(prompt, prompt + answer, len(ids))))
    return found


def ours() -> Callable[[list[Example]], None]:
    model = load_model(str(demo_model()), dtype=torch.bfloat16, device=torch.device("cpu"))
    method = Lora(rank=16)
    method.adapt(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-5)
    precision = Precision(torch.bfloat16, torch.device("cpu"), autocast=method.needs_autocast)
    model.train()

    def run(rows: list[Example]) -> None:
        step(model, Dpo(), optimizer, [pack(rows)], precision=precision)

    return run


def theirs(directory: str, rows: list[Example], count: int) -> Callable[[], None]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    path = str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = []
    for row in rows:
        assert row.segments is not None
        prompt, chosen, rejected = (row.token_ids[s : s + n] for s, n, _ in row.segments.tolist())
        # TRL tokenizes texts: what it makes of these is cut to the same lengths below.
        data.append(
            {
                "prompt": tokenizer.decode(prompt),
                "chosen": tokenizer.decode(chosen),
                "rejected": tokenizer.decode(rejected),
            }
        )
    config = DPOConfig(
        output_dir=directory,
        per_device_train_batch_size=count,
        precompute_ref_log_probs=True,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_length=None,
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=lora
    )
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = [max(len(row.token_ids[: int(row.segments[2, 0])]) for row in rows if row.segments is not None)]
    for name, tensor in batch.items():
        if tensor.dim() == 2:
            batch[name] = tensor[:, : lengths[0]]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        batch.setdefault(name, torch.full((count,), -500.0))
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-5)
    trainer.model.train()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        optimizer.step()

    return run


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def beside_trl(count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for prompt, answer in SHAPES[:2]:
            rows = pairs(count, prompt, answer)
            here, there = ours(), theirs(directory, rows, count)
            here(rows)
            there()
            both = [(seconds(partial(here, rows)), seconds(there)) for _ in range(rounds)]
            ratio = statistics.median(b / a for a, b in both)
            low, high = min(b / a for a, b in both), max(b / a for a, b in both)
            first, second = (statistics.median(side) for side in zip(*both, strict=True))
            print(
                f"prompt {prompt}, answers {answer}: {first:.2f} s here, {second:.2f} s TRL, "
                f"ratio {ratio:.2f} ({low:.2f} … {high:.2f})",
                flush=True,
            )


def sharing(count: int, rounds: int) -> None:
    run = ours()
    for prompt, answer in SHAPES:
        rows = pairs(count, prompt, answer)
        apart = [part for row in rows for part in row.apart()]
        run(rows)
        run(apart)
        both = [(seconds(partial(run, rows)), seconds(partial(run, apart))) for _ in range(rounds)]
        gain = statistics.median(b / a for a, b in both)
        bound = 2 * (prompt + answer) / (prompt + 2 * answer)
        share = (1 - 1 / gain) / (1 - 1 / bound)
        print(
            f"prompt {prompt}, answers {answer}: x {gain:.2f} of x {bound:.2f} by tokens: {share:.0%} of the time saved"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--part", choices=("trl", "sharing"))
    given = parser.parse_args()
    if given.part != "trl":
        sharing(given.pairs, given.steps)
    if given.part != "sharing":
        beside_trl(given.pairs, given.steps)


if __name__ == "__main__":
    main()
