"""What this machine has."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The device that a job runs on.

    Attributes:
        device: as torch names it.
        name: as people name it.
        memory_bytes: all memory of the device; the host's for a CPU.
        processes: how many work on the job together.
        shares_host_memory: whether the interpreter lives in the same memory.
    """

    device: torch.device
    name: str
    memory_bytes: int
    processes: int
    shares_host_memory: bool


def detect_hardware() -> Hardware:
    """The best device at hand: CUDA, then Apple's, then the CPU."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    host = psutil.virtual_memory().total
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        properties = torch.cuda.get_device_properties(index)
        return Hardware(torch.device("cuda", index), properties.name, properties.total_memory, processes, False)
    if torch.backends.mps.is_available():
        return Hardware(torch.device("mps"), "Apple GPU", host, processes, True)
    return Hardware(torch.device("cpu"), f"CPU with {torch.get_num_threads()} threads", host, processes, True)


def native_dtypes(device: torch.device) -> set[str]:
    """Dtypes that the device multiplies in hardware, without emulation."""
    if device.type == "cuda":
        return {"fp32", "fp16", "bf16"} if torch.cuda.is_bf16_supported(including_emulation=False) else {"fp32", "fp16"}
    if device.type == "mps":
        return {"fp32", "fp16", "bf16"}
    capable = (
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )
    return {"fp32", "bf16"} if capable else {"fp32"}


@lru_cache(maxsize=8)
def multiply_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Floating-point operations per second of matrix products at the shapes of training, measured for a moment,
    once in a process: plans that are compared are compared at the same rate."""
    left = torch.randn(1024, 768, device=device).to(dtype)
    right = torch.randn(768, 1536, device=device).to(dtype)
    operations = 2 * 1024 * 768 * 1536
    for _ in range(3):
        torch.matmul(left, right)
    wait_for(device)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(4):
            torch.matmul(left, right)
        wait_for(device)
        count += 4
    return operations * count / elapsed


def wait_for(device: torch.device) -> None:
    """Until everything that the device was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
