"""The workers of `generation_speed.py`: each answers the same prompts, batch after batch.

python bench/generation_sides.py tunesmith|transformers|llama.cpp WORK.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from turns import Turns

Answer = Callable[[list[list[int]], int], list[list[int]]]
"""Takes prompts and a batch size and returns the new tokens after each prompt."""


def tunesmith(work: dict[str, Any]) -> Answer:
    import torch

    from tunesmith.base import silent
    from tunesmith.engine.generate import Sampling, generate
    from tunesmith.models.load import load_model, locate_model
    from tunesmith.plan.hardware import DTYPES

    model = load_model(locate_model("demo"), dtype=DTYPES[work["dtype"]], device=torch.device("cpu"))
    sampling = Sampling(max_new_tokens=work["new_tokens"])

    def answer(prompts: list[list[int]], batch: int) -> list[list[int]]:
        found = generate(model, prompts, sampling, stop_ids={work["never"]}, batch_size=batch, progress=silent)
        return [list(one.token_ids) for one in found]

    return answer


def transformers(work: dict[str, Any]) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.models.load import locate_model
    from tunesmith.plan.hardware import DTYPES

    model: Any = AutoModelForCausalLM.from_pretrained(locate_model("demo"), dtype=DTYPES[work["dtype"]])
    settings = {"max_new_tokens": work["new_tokens"], "do_sample": False}
    settings |= {"eos_token_id": work["never"], "pad_token_id": work["never"]}

    def answer(prompts: list[list[int]], batch: int) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(prompts), batch):
            chosen = prompts[start : start + batch]
            longest = max(map(len, chosen))
            ids = torch.tensor([[work["never"]] * (longest - len(prompt)) + prompt for prompt in chosen])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in chosen])
            found += model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:].tolist()
        return found

    return answer


def llama(work: dict[str, Any]) -> Answer:
    import xllamacpp  # pyright: ignore[reportMissingImports]

    largest = max(job["batch"] for job in work["jobs"])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = work["gguf"]
    parameters.n_parallel = largest
    parameters.n_ctx = largest * 1024
    parameters.cache_prompt = False
    server = xllamacpp.Server(parameters)

    def one(prompt: list[int]) -> list[int]:
        asked = {"prompt": prompt, "n_predict": work["new_tokens"], "max_tokens": work["new_tokens"], "temperature": 0}
        asked |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        answer = server.handle_completions(asked)
        return _tokens(answer if isinstance(answer, dict) else json.loads(answer), work["new_tokens"])

    def answer(prompts: list[list[int]], batch: int) -> list[list[int]]:
        with ThreadPoolExecutor(batch) as pool:
            return list(pool.map(one, prompts))

    return answer


def _tokens(answer: dict[str, Any], count: int) -> list[int]:
    """The new tokens, or as many zeros when the server tells their number alone."""
    if answer.get("tokens"):
        return answer["tokens"]
    written = answer["usage"]["completion_tokens"] if "usage" in answer else answer["tokens_predicted"]
    if written != count:
        raise SystemExit(f"llama.cpp wrote {written} tokens instead of {count}")
    return [0] * written


def main() -> None:
    work = json.loads(Path(sys.argv[2]).read_text())
    turns = Turns()
    answer = {"tunesmith": tunesmith, "transformers": transformers, "llama.cpp": llama}[sys.argv[1]](work)
    turns.ready()
    for job in work["jobs"]:
        started = time.perf_counter()
        answers = answer(job["prompts"], job["batch"])
        seconds = time.perf_counter() - started
        tokens = sum(map(len, answers))
        turns.took({"batch": job["batch"], "seconds": seconds, "tokens": tokens, "answers": answers})


if __name__ == "__main__":
    main()
