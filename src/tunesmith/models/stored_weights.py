"""Single weights of a saved model, read from its safetensors files without loading the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor

from tunesmith.base import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredWeights:
    """The weights of a saved model by name.

    Args:
        location: a directory, or a hub id whose files are in the cache already.

    Raises:
        InputError: when there are no safetensors files.
    """

    def __init__(self, location: str) -> None:
        self._location = location
        index = self._file(INDEX)
        if index is not None:
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: index.parent / file for name, file in files.items()}
            return
        whole = self._file(WHOLE)
        if whole is None:
            raise InputError(
                "the model's own weights are not to be found", where=location, fix="load it from a directory"
            )
        with safe_open(whole, "pt") as opened:
            self._files = dict.fromkeys(cast(Any, opened).keys(), whole)

    def _file(self, name: str) -> Path | None:
        if Path(self._location).is_dir():
            path = Path(self._location) / name
            return path if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._location, name)
        return Path(found) if isinstance(found, str) else None

    def read(self, name: str) -> Tensor:
        """A weight in the dtype it is stored in; base models are stored without the prefix of the causal one.

        Raises:
            InputError: when there is none of that name.
        """
        known = next((key for key in (name, name.partition(".")[2]) if key in self._files), None)
        if known is None:
            raise InputError(f"the model's files hold no {name}", where=self._location)
        with safe_open(self._files[known], "pt") as opened:
            return cast(Any, opened).get_tensor(known)
