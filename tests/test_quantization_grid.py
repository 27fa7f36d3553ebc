"""The simulated 4-bit formats against those who write them: gguf's numpy quantizer and bitsandbytes."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from tunesmith.models.quantization_grid import BLOCK, Grid

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES: Any = ("q4_0", "q4_1", "nf4")
TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(96, 128, generator=generator)
    return {
        "usual": (usual * 0.05).to(dtype),
        "wide": (usual * torch.logspace(-6, 3, 96)[:, None]).to(dtype),
        "ties": torch.randint(-3, 4, (64, 64), generator=generator).to(dtype),
        "one sign": (usual.abs() + 1).to(dtype),
        "flat blocks": torch.cat([torch.zeros(4, 64), torch.full((4, 64), 0.3), torch.full((4, 64), -2.0)]).to(dtype),
    }


def gguf_rounded(weight: Tensor, name: str) -> Tensor:
    kind = TYPES[name]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), kind), kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_formats_are_exact_to_the_bit(name: Any, dtype: torch.dtype) -> None:
    for what, weight in weights(dtype).items():
        assert torch.equal(Grid(name).rounded(weight), gguf_rounded(weight, name)), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    for what, weight in weights(dtype).items():
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
        expected = functional.dequantize_4bit(packed, state)
        assert torch.equal(Grid("nf4").rounded(weight).to(dtype), expected), what


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_on_the_grid_stays_and_other_weights_have_a_distance(name: Any) -> None:
    weight = weights()["usual"]
    once = Grid(name).rounded(weight)
    assert 0.05 < Grid(name).distance(weight) < 0.15
    # Scales are kept in fp16, so that a second rounding finds nearly the same ones.
    assert Grid(name).distance(once) < 1e-3
    assert len(once.view(-1, BLOCK[name])[0].unique()) <= 16


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_no_block_fits_are_known(name: Any) -> None:
    assert Grid(name).takes(64)
    assert Grid(name).takes(40) == (name == "nf4")
    if name == "nf4":
        assert Grid(name).rounded(torch.randn(3, 7)).shape == (3, 7)
