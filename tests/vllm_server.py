"""A small stand-in for a vLLM server: the routes that rollouts ask for, answered by a tiny model in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunesmith.base import silent
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods.adapter_files import load_adapter


@dataclass
class Vllm:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        updates: whether it was started so that adapters may be loaded.
        sees: whether it sees the directory of the adapters.
        shift: added to every log-probability that it tells.
        fields: replaced in every answer.
        delay: seconds before every answer.
    """

    base: Path
    updates: bool = True
    sees: bool = True
    max_rank: int = 16
    shift: float = 0.0
    delay: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((route, body))
        if route == "/v1/models":
            return 200, {"data": [{"id": "base", "root": str(self.base), "parent": None}]}
        if route == "/v1/completions":
            return 200, self.completion(body)
        if not self.updates or route not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        return self.load(body) if route == "/v1/load_lora_adapter" else self.unload(body)

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.held:
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        if not self.sees or not path.is_dir():
            return 404, _error(f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 400, _error(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        load_adapter(model, path)
        self.held[name] = model.eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.held.pop(body["lora_name"], None) is None:
            return 404, _error(f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["temperature"] == 1 and body["top_p"] == 1 and body["ignore_eos"]
        model, prompt = self.held[body["model"]], body["prompt"]
        sampling, stops = Sampling(body["max_tokens"], temperature=1.0), set(body["stop_token_ids"])
        # One at a time: a model of torch is no server.
        with self.lock, torch.no_grad():
            [found] = generate(
                model, [prompt], sampling, stop_ids=stops, batch_size=1, progress=silent, seeds=[body["seed"]]
            )
            ids = [*found.token_ids, *([] if found.stop_id is None else [found.stop_id])]
            said = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps = [float(said[at, token]) + self.shift for at, token in enumerate(ids)]
        tokens = [f"token_id:{token}" for token in ids]
        choice = {
            "token_ids": ids,
            "finish_reason": found.finish_reason,
            "logprobs": {"token_logprobs": logps, "tokens": tokens},
        }
        return {"choices": [{**choice, **self.fields}]}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


@contextmanager
def serving(base: Path, **settings: Any) -> Iterator[Vllm]:
    vllm = Vllm(base, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            time.sleep(vllm.delay)
            status, found = vllm.answer(self.path, body)
            text = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    vllm.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield vllm
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
