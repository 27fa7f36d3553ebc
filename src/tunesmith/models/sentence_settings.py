"""What sentence-transformers keeps beside an encoder: how it makes one vector of a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.base import InputError

POOLING_FILE = "1_Pooling/config.json"
_MODES: dict[str, Literal["mean", "cls"]] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class SentenceSettings:
    """What was found.

    Attributes:
        pooling: None where there is no such file, or it names another way than these.
        unknown: why nobody can tell whether there is one; None when that is known.
    """

    pooling: Literal["mean", "cls"] | None = None
    unknown: str | None = None


def read_sentence_settings(location: str, revision: str | None = None) -> SentenceSettings:
    """Looks for those settings in a directory, or among the files of a hub id.

    Raises:
        InputError: when they are there and cannot be read.
    """
    path, unknown = _pooling_file(location, revision)
    if path is None:
        return SentenceSettings(unknown=unknown)
    try:
        modes = json.loads(path.read_text(encoding="utf-8"))
        return SentenceSettings(next((pooling for name, pooling in _MODES.items() if modes.get(name)), None))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"cannot read the model's settings for sentences: {error}", where=path, fix="name objective.pooling"
        ) from error


def _pooling_file(location: str, revision: str | None) -> tuple[Path | None, str | None]:
    """Where the file is, and why that is not known."""
    if Path(location).is_dir():
        path = Path(location) / POOLING_FILE
        return (path if path.is_file() else None), None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(location, POOLING_FILE, revision=revision)
    if cached is not None:  # else a path, or the hub's word from before that there is none
        return (Path(cached) if isinstance(cached, str) else None), None
    try:
        return Path(hf_hub_download(location, POOLING_FILE, revision=revision)), None
    except LocalEntryNotFoundError:
        return None, "the hub cannot be reached, and they are not in the cache"
    except EntryNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, lines[0] if lines else type(error).__name__
