"""Answers drawn by a server that is given every new adapter, against a stand-in that runs the tiny model."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from conftest import colour_rows, write_jsonl
from tiny import tiny
from tunesmith.base import InputError, TrainingError, TunesmithError, silent
from tunesmith.methods import Lora
from tunesmith.objectives.policy import RolloutServer
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.planning import plan_job
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run
from tunesmith.train.rollout_server import Question, ServedAnswers
from vllm_server import serving

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    (root / "mine.py").write_text("def score(prompt, answer, references):\n    return answer.count('e')\n")
    prompts = [{"prompt": row["prompt"]} for row in colour_rows(12)]
    base = root / "base"
    tiny(tie_word_embeddings=True).save_pretrained(base)
    return {"prompts": write_jsonl(root / "prompts.jsonl", prompts), "root": root, "base": base}


def values(places: dict[str, Path], model: Path, output: Path, **objective: Any) -> dict[str, Any]:
    reward = {"kind": "function", "path": f"{places['root'] / 'mine.py'}:score"}
    return {
        "model": str(model),
        "data": {"train": str(places["prompts"])},
        "method": {"kind": "lora", "rank": 4},
        "objective": {"kind": "grpo", "max_new_tokens": 5, "group_size": 3, "reward": reward, **objective},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 0.05, "dtype": "fp32"},
        "evaluate": "off",
        "output": str(output),
    }


def rollouts(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == "rollout"]


def test_a_server_draws_what_this_process_would(places: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """It has the weights of each step: the same answers, and so the same adapter, byte for byte."""
    own = finetune(check_recipe(values(places, tiny_model, tmp_path / "own"), "test"))
    shared = tmp_path / "shared"
    with serving(tiny_model) as vllm:
        asked = values(places, tiny_model, tmp_path / "run", rollouts={"server": vllm.url, "adapters": str(shared)})
        run = finetune(check_recipe(asked, "test"))
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (own.path / name).read_bytes()
    for served, drawn in zip(rollouts(run), rollouts(own), strict=True):
        assert served.pop("server_gap") == pytest.approx(0, abs=1e-5)
        assert served == drawn
    routes = [route for route, _ in vllm.asked]
    assert routes.count("/v1/load_lora_adapter") == routes.count("/v1/unload_lora_adapter") == 3
    assert routes.count("/v1/completions") == 3 * 2 * 3
    assert len({body["lora_name"] for route, body in vllm.asked if route == "/v1/load_lora_adapter"}) == 3
    assert len({body["seed"] for route, body in vllm.asked if route == "/v1/completions"}) == 3 * 2 * 3
    assert not vllm.held and not list(shared.iterdir())


def test_a_server_with_another_model_ends_the_run(places: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    with (
        serving(tiny_model, shift=2.0) as vllm,
        pytest.raises(TrainingError, match=r"2 nats a token apart about them: it has another model"),
    ):
        finetune(check_recipe(values(places, tiny_model, tmp_path, rollouts={"server": vllm.url}), "test"))


def served(places: dict[str, Path], directory: Path, url: str, timeout: float = 30, rank: int = 4) -> ServedAnswers:
    spec = RolloutServer(server=url, timeout=timeout)
    return ServedAnswers(spec, Lora(rank=rank), str(places["base"]), directory, "test", 4, frozenset({2}), 2)


def drawn(answers: ServedAnswers) -> Any:
    model = tiny(tie_word_embeddings=True)
    answers.method.adapt(model)
    return answers(model, [Question([3, 4], 1), Question([5], 2)], silent)


TROUBLES: dict[str, tuple[dict[str, Any], str]] = {
    "no updates": ({"updates": False}, "takes no adapters while it runs"),
    "not seen": ({"sees": False}, "the server does not see the adapter in"),
    "rank": ({"max_rank": 2}, "LoRA rank 4 is greater than max_lora_rank 2"),
    "no ids": ({"fields": {"token_ids": None, "logprobs": None}}, "use vLLM 0.10.2 or newer"),
    "aborted": ({"fields": {"finish_reason": "abort"}}, "ended by 'abort'"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_what_a_server_cannot_is_told(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    settings, what = TROUBLES[name]
    with serving(places["base"], **settings) as vllm, pytest.raises(TunesmithError) as told:
        drawn(served(places, tmp_path, vllm.url))
    assert what in str(told.value) and "\n  → " in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_or_late_is_told(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no vLLM server answers: .*refused"):
        served(places, tmp_path, NOBODY).check()
    with pytest.raises(TunesmithError, match="continues with --resume"):
        drawn(served(places, tmp_path, NOBODY))
    with (
        serving(places["base"], delay=0.5) as vllm,
        pytest.raises(TunesmithError, match=r"has not answered /v1/load_lora_adapter within 0.1 s"),
    ):
        drawn(served(places, tmp_path, vllm.url, timeout=0.1))


def test_a_key_goes_to_no_other_host(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[str, str | None]]()

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            if self.path == "/v1/models":
                self.send_response(302)
                self.send_header("Location", "/other")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None: ...

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="no OpenAI-compatible server"):
            served(places, tmp_path, f"http://127.0.0.1:{server.server_port}").check()
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [("/v1/models", "Bearer secret"), ("/other", None)]


def test_an_older_server_and_another_base(places: dict[str, Path], tmp_path: Path) -> None:
    with serving(places["base"], fields={"token_ids": None}) as vllm:
        answers = served(places, tmp_path, vllm.url)
        assert answers.check() == []
        first, _ = drawn(answers)
        assert first.logps is not None and len(first.logps) == len(first.token_ids) + (first.stop_id is not None)
        vllm.base = tmp_path
        [note] = answers.check()
    assert f"serves {tmp_path}, and this job trains {places['base']}" in note


def test_an_adapter_that_a_killed_run_left_there_is_used(places: dict[str, Path], tmp_path: Path) -> None:
    with serving(places["base"]) as vllm:
        answers = served(places, tmp_path, vllm.url)
        before = drawn(answers)
        vllm.unload = lambda body: (200, "Success")  # type: ignore[method-assign]
        drawn(answers)
        assert len(vllm.held) == 1
        assert drawn(answers) == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"method": "full"}, "vLLM takes new weights as LoRA's adapters, and this is full"),
    "dora": ({"method": {"kind": "lora", "dora": True}}, "method.dora: vLLM does not load such an adapter"),
    "whole": ({"method": {"kind": "lora", "modules_to_save": ["lm_head"]}}, "method.modules_to_save: vLLM does"),
    "rounded": ({"method": {"kind": "lora", "quantization_aware": "q4_0"}}, "without rounding it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_no_server_loads_are_refused(
    name: str, places: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    sections, what = REFUSED[name]
    given = {**values(places, tiny_model, tmp_path / "run", rollouts={"server": NOBODY}), **sections}
    with pytest.raises(InputError) as told:
        plan_job(check_recipe(given, "test"))
    assert what in str(told.value)


@pytest.mark.parametrize("server", ["localhost:8000", "file:///etc/passwd", "http://here/v1"])
def test_an_address_is_one_of_a_server(server: str) -> None:
    with pytest.raises(ValueError, match="is no address of a server"):
        RolloutServer(server=server)
