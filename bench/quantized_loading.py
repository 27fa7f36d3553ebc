"""Peak memory of loading a model whole and quantized, each in a process of its own.

    python bench/quantized_loading.py [--model demo]

Anonymous memory is what the process itself holds; the pages of the weights' file that are mapped while they are read
count as resident too, and can be taken back by the system at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

KINDS = ("none", "int8", "nf4", "fp4")


def memory(name: str) -> float:
    """A line of Linux's account of this process, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


class Peak:
    """The largest anonymous memory while it is open, looked at every two milliseconds."""

    def __enter__(self) -> Peak:
        self.value, self._done = memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.value = max(self.value, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def child(path: str, kind: str) -> None:
    import torch

    from tunesmith.models.load import load_model, locate_model
    from tunesmith.models.quantized import import_bitsandbytes, quantization

    import_bitsandbytes("quantized loading", "--model")
    import_module("transformers.models.llama.modeling_llama")  # what every kind imports is not counted
    location = locate_model(path)
    before = memory("RssAnon")
    with Peak() as peak:
        model = load_model(location, dtype=torch.bfloat16, device=torch.device("cpu"), quantized=quantization(kind))
    stored = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict(keep_vars=True).values()) / 2**20
    shared = "lm_head.weight" in model.state_dict() and model.config.tie_word_embeddings
    if shared:
        head = model.get_output_embeddings().weight
        stored -= head.numel() * head.itemsize / 2**20
    found = {"weights": stored, "held": memory("RssAnon") - before, "peak": peak.value - before}
    print(json.dumps({**found, "resident": memory("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.model, given.child)
        return
    print("| quantize | weights, MB | held after loading, MB | peak while loading, MB | peak of the process, MB |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        command = [sys.executable, __file__, "--model", given.model, "--child", kind]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"| {kind} | " + " | ".join(f"{value:.0f}" for value in found.values()) + " |")


if __name__ == "__main__":
    main()
