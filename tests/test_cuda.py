"""The same step and the same answers on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import random_rows, shake, tiny
from tunesmith.base import silent
from tunesmith.batch import pack
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.objectives import Supervised
from tunesmith.train.loop import step
from tunesmith.train.precision import Precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ROWS = random_rows((9, 17, 12, 30))
MILD = {"initializer_range": 0.06}


def gradients(model_type: str, method: Any, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and gradients of one step; bf16 runs through the kernels for rows of any length."""
    frozen = torch.float32 if isinstance(method, Full) else dtype
    model = tiny(model_type, dtype=frozen, **MILD)
    method.adapt(model)
    shake(model)
    model.to(device).train()
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.0)
    precision = Precision(dtype, device, autocast=frozen != dtype)
    loss = step(model, Supervised(), optimizer, [pack(ROWS).to(device)], clip=None, precision=precision).loss
    found = [p.grad.float().reshape(-1).cpu() for p in trainable_parameters(model).values() if p.grad is not None]
    return loss, torch.cat(found)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "mistral", "gpt2", "phi3"])
@pytest.mark.parametrize("method", [Lora(rank=4), Full()], ids=["lora", "full"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_a_step_is_that_of_the_cpu(model_type: str, method: Any, dtype: torch.dtype, error: float) -> None:
    expected_loss, expected = gradients(model_type, method, torch.device("cpu"), torch.float32)
    loss, found = gradients(model_type, method, torch.device("cuda"), dtype)
    assert loss == pytest.approx(expected_loss, rel=error)
    assert float((found - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_answers_are_those_of_the_cpu(model_type: str) -> None:
    prompts = [row.token_ids[:7].tolist() for row in ROWS]
    model = tiny(model_type)
    said = [
        generate(model.to(device), prompts, Sampling(12), stop_ids={2}, batch_size=3, progress=silent)
        for device in (torch.device("cpu"), torch.device("cuda"))
    ]
    assert said[0] == said[1]
