"""An OpenAI-compatible endpoint for chat completions, asked one question at a time.

Python's own HTTP client is used: which of several others comes with `huggingface_hub` changes with its version.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tunesmith.base import InputError, TunesmithError

TRIES = 5
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
TIMEOUT_SECONDS = 120.0
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses after which the same request may succeed."""


@dataclass(frozen=True)
class Reply:
    """What a model answered, and the tokens that it took; None where the endpoint does not say."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Endpoint:
    """Where and whom to ask.

    Attributes:
        url: as a client's `base_url`, for example `http://localhost:8000/v1`.
        key: sent as a bearer token, to this host alone; shown and stored nowhere.
        wait: sleeps; a test need not.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{self.url!r} is no address of an endpoint", where="--judge", fix="use https://HOST/v1")
        if parts.username or parts.password:
            raise InputError(
                "a key does not belong into the address",
                where="--judge",
                fix="put it into an environment variable and name that with --judge-key-env",
            )

    def ask(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Reply:
        """One answer at temperature 0; what passes by itself is tried again, later each time.

        Raises:
            InputError: the endpoint refuses the request.
            TunesmithError: it does not answer, or not in this protocol.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
        request = urllib.request.Request(
            self._address(), json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # to no other host
        trouble, asked = "", None
        for left in range(TRIES - 1, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                    return _reply(response.read(), self.url)
            except urllib.error.HTTPError as error:
                if error.code not in PASSING:
                    raise self._refusal(error) from error
                trouble, asked = f"status {error.code}", error.headers.get("Retry-After")
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                trouble, asked = str(getattr(error, "reason", error)), None
            if left:
                self.wait(_seconds(asked, TRIES - 1 - left))
        raise TunesmithError(
            f"the endpoint did not answer in {TRIES} tries ({trouble}); what it has judged is kept",
            where=self.url,
            fix="run the same command again when it is there",
        )

    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def _refusal(self, error: urllib.error.HTTPError) -> InputError:
        said = " ".join(error.read(400).decode("utf-8", "replace").split())
        if self.key:
            said = said.replace(self.key, "…")
        fix = "look at --judge, --judge-model and the rights of the key"
        if error.code in (401, 403):
            fix = "name the environment variable that holds its key: --judge-key-env NAME"
        return InputError(f"the endpoint refuses with status {error.code}: {said}", where=self.url, fix=fix)


def _seconds(asked: str | None, before: int) -> float:
    """What the endpoint asks for, or twice as long as the last time."""
    if asked is not None and asked.strip().isdigit():
        return min(LONGEST_WAIT, float(asked))
    return min(LONGEST_WAIT, FIRST_WAIT * 2**before)


def _reply(body: bytes, url: str) -> Reply:
    try:
        values: dict[str, Any] = json.loads(body)
        text = values["choices"][0]["message"]["content"]
        usage = values.get("usage") or {}
        return Reply(text or "", usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise TunesmithError(
            "the endpoint's answer is no chat completion",
            where=url,
            fix="name an OpenAI-compatible one: http://HOST/v1",
        ) from error
