"""Answers drawn by a vLLM server, which is given each new adapter while it runs.

Source of the routes: vLLM's documentation ("Dynamically serving LoRA adapters"), and its OpenAI-compatible
completions with token ids as the prompt and its own parameters `stop_token_ids`, `ignore_eos` and `return_token_ids`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from tunesmith.base import InputError, Progress, TunesmithError
from tunesmith.engine.sampling import Generation
from tunesmith.files import file_sha256
from tunesmith.methods import Method
from tunesmith.objectives.policy import RolloutServer
from tunesmith.train.parallel import is_main, wait_for_all

KEY = "objective.rollouts"
API_KEY = "VLLM_API_KEY"
"""Environment variable with the key of a server that asks for one."""
SERVE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora"
WEIGHTS = "adapter_model.safetensors"
ID_PREFIX = "token_id:"


class Question(NamedTuple):
    """What the server is asked: a prompt's token ids, and the seed of the answer's random numbers."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class ServedAnswers:
    """Answers of the model as it is, drawn by a server.

    Attributes:
        base: as the adapter names it.
        directory: where adapters are put for the server.
        run: distinguishes this job's adapters from those of others on the same server.
        at_once: answers asked for at a time.
    """

    spec: RolloutServer
    method: Method
    base: str
    directory: Path
    run: str
    max_new_tokens: int
    stop_ids: frozenset[int]
    at_once: int

    def check(self) -> list[str]:
        """Asks the server what it serves; gives what a user should know.

        Raises:
            InputError: when nobody answers there, or what answers is no such server.
        """
        try:
            served = self._ask("/v1/models")["data"]
            roots = [str(model.get("root") or model["id"]) for model in served if not model.get("parent")]
        except TunesmithError as error:
            raise InputError(error.what, where=error.where, fix=error.fix) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "what answers at /v1/models is no OpenAI-compatible server",
                where=self._place,
                fix=f"start one: {SERVE}",
            ) from error
        if self.base in roots or not roots:
            return []
        return [
            f"{self._place} serves {', '.join(roots)}, and this job trains {self.base}: they must be the same weights; "
            "server_gap in events.jsonl says how far the two are apart"
        ]

    def __call__(self, model: nn.Module, questions: Sequence[Question], progress: Progress) -> list[Generation]:
        """The answers in the order of the questions, each with its tokens' log-probabilities as the server finds them.

        Args:
            progress: called after each answer; what it raises ends the drawing.

        Raises:
            TunesmithError: when the server is away, is too slow, does not take the adapter, or says something else than
                asked for.
        """
        with _on_server(self, model) as name:
            found: dict[int, Generation] = {}
            with ThreadPoolExecutor(self.at_once) as pool:
                asked = {pool.submit(self._answer, name, question): at for at, question in enumerate(questions)}
                try:
                    for done in as_completed(asked):
                        found[asked[done]] = done.result()
                        progress("answering", len(found), len(questions))
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            return [found[at] for at in range(len(questions))]

    def _answer(self, name: str, question: Question) -> Generation:
        found = self._ask(
            "/v1/completions",
            {
                "model": name,
                "prompt": list(question.prompt),
                "seed": question.seed,
                "max_tokens": self.max_new_tokens,
                # All that a server's own defaults (generation_config.json) could bend the distribution by.
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": sorted(self.stop_ids),
                "ignore_eos": True,
                "logprobs": 1,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            choice = found["choices"][0]
            logps = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            ids = choice.get("token_ids")
            if ids is None:
                ids = [text.removeprefix(ID_PREFIX) for text in choice["logprobs"]["tokens"]]
            return self._generation([int(token) for token in ids], logps, choice["finish_reason"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TunesmithError(
                f"its answer lacks token ids, log-probabilities or a reason why it ended ({error!r})",
                where=self._place,
                fix="use vLLM 0.10.2 or newer",
            ) from error

    def _generation(self, ids: list[int], logps: list[float], reason: str) -> Generation:
        if len(ids) != len(logps) or not ids:
            raise ValueError(f"{len(ids)} tokens and {len(logps)} log-probabilities")
        if reason == "length":
            return Generation(ids, "length", None, logps)
        if reason != "stop" or ids[-1] not in self.stop_ids:
            raise ValueError(f"ended by {reason!r} after token {ids[-1]}")
        return Generation(ids[:-1], "stop", ids[-1], logps)

    def load(self, name: str, path: Path) -> None:
        """Gives the server an adapter; one of this name is of the same weights, and stays."""
        status, said = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        if status == 200 or "already been loaded" in said or "already loaded" in said:
            return
        what, fix = f"the server does not take the adapter: {said or status}", f"start it so: {SERVE}"
        if status == 404 and "No adapter found" in said:
            what = f"the server does not see the adapter in {path}"
            fix = "name a directory in objective.rollouts.adapters that both sides see under this path"
        elif status in (404, 405):
            what = "the server takes no adapters while it runs"
        elif "rank" in said:
            fix = "start it with a larger --max-lora-rank"
        raise TunesmithError(what, where=self._place, fix=fix)

    def unload(self, name: str) -> None:
        """Takes an adapter off the server; one that is not there is no error."""
        status, said = self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise TunesmithError(f"the server does not let go of the adapter {name}: {said or status}", where=KEY)

    def _ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        status, said = self._post(route, body)
        try:
            found = json.loads(said)
        except ValueError:
            found = None
        if status != 200 or not isinstance(found, dict):
            raise TunesmithError(
                f"the server answers {route} with {status}: {said[:300] or 'nothing'}",
                where=self._place,
                fix=f"look at its log; it is to be started so: {SERVE}",
            )
        return found

    def _post(self, route: str, body: dict[str, Any] | None) -> tuple[int, str]:
        """Status and text of the answer; a GET without a body."""
        data = None if body is None else json.dumps(body).encode()
        address, headers = self.spec.server.rstrip("/") + route, {"Content-Type": "application/json"}
        request = urllib.request.Request(address, data=data, headers=headers)
        if key := os.environ.get(API_KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # to no other host
        try:
            with urllib.request.urlopen(request, timeout=self.spec.timeout) as answer:
                return int(answer.status), answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return error.code, _message(error.read().decode("utf-8", "replace"))
        except TimeoutError as error:
            raise self._late(route) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise self._late(route) from error
            raise TunesmithError(
                f"no vLLM server answers: {getattr(error, 'reason', error)}",
                where=self._place,
                fix=f"start one, {SERVE}; a run that has begun continues with --resume",
            ) from error

    def _late(self, route: str) -> TunesmithError:
        return TunesmithError(
            f"the server has not answered {route} within {self.spec.timeout:g} s",
            where=self._place,
            fix="raise objective.rollouts.timeout, or lower objective.sample_batch; continue with --resume",
        )

    @property
    def _place(self) -> str:
        return f"{KEY}.server {self.spec.server}"


@contextmanager
def _on_server(served: ServedAnswers, model: nn.Module) -> Iterator[str]:
    """Has the server hold the model's adapter as it is, under a name of its own for these weights.

    vLLM keeps what it has computed of prompts by the adapter's name, so a name must never mean other weights. After an
    error the adapter stays: the run that is resumed asks for the same one, or it falls out by the server's own rules.
    """
    with _written(served, model) as (name, path):
        if is_main():
            served.load(name, path)
        wait_for_all()
        yield name
        wait_for_all()
        if is_main():
            served.unload(name)


@contextmanager
def _written(served: ServedAnswers, model: nn.Module) -> Iterator[tuple[str, Path]]:
    """The adapter in PEFT's format where the server sees it; gone afterwards."""
    fresh = served.directory / f"{served.run}-new"
    if is_main():
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            served.method.save(model, fresh, base=served.base)
        except PermissionError as error:
            raise InputError(
                f"adapters cannot be written: {error.strerror}",
                where=f"{KEY}.adapters {served.directory}",
                fix="name a directory that may be written to",
            ) from error
    wait_for_all()
    digest = file_sha256(fresh / WEIGHTS)
    name = f"tunesmith-{sha256(f'{served.run} {digest}'.encode()).hexdigest()[:16]}"
    final = served.directory / name
    wait_for_all()
    if is_main():
        shutil.rmtree(final, ignore_errors=True)
        fresh.rename(final)
    try:
        yield name, final
    finally:
        if is_main():
            shutil.rmtree(final, ignore_errors=True)


def _message(body: str) -> str:
    """What an error of the server says: vLLM's and FastAPI's are JSON."""
    try:
        found = json.loads(body)
    except ValueError:
        return body.strip()
    if not isinstance(found, dict):
        return body.strip()
    error = found.get("error", found)
    return str(cast(dict[str, Any], error).get("message", body)) if isinstance(error, dict) else str(error)
