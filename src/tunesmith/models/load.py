"""The door to transformers: configurations, weights and tokenizers, every failure said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent

if TYPE_CHECKING:  # models take seconds to import, and those who count tokens need none
    import torch
    from torch import nn
    from transformers import PreTrainedModel

DEMO = "demo"
WEIGHT_FILES = ("*.safetensors",)


def locate_model(path: str, progress: Progress = silent) -> str:
    """Turns what a recipe names into a directory or a hub id; `demo` is fetched when it is not here yet.

    Raises:
        InputError: when a directory is named that does not exist or holds no model.
    """
    if path == DEMO and not Path(path).exists():
        from tunesmith.models.demo import demo_model

        return str(demo_model(progress))
    directory = Path(path).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise InputError(
                "this directory holds no model: there is no config.json",
                where=directory,
                fix="name the directory that transformers saved the model in",
            )
        return str(directory)
    looks_local = path.startswith((".", "/", "~", "\\")) or path.count("/") != 1 or directory.exists()
    if looks_local and path.count("/") != 0:
        raise InputError("no such model directory", where=path, fix="check the path, or name a hub id such as org/name")
    return path


@contextmanager
def told_plainly(what: str, path: str) -> Iterator[None]:
    """Turns what transformers raises about a model that cannot be had into one error."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[0] if lines else type(error).__name__
        raise InputError(
            f"{what} cannot be loaded: {detail}",
            where=path,
            fix="give a local directory with config.json, tokenizer and safetensors weights, or a hub id "
            "that this machine can reach",
        ) from error


def read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    with told_plainly("the model's configuration", path):
        return AutoConfig.from_pretrained(path, revision=revision)


_SAID_IN_FULL = (
    "attention_bias attention_dropout head_dim hidden_act hidden_size intermediate_size max_position_embeddings "
    "mlp_bias num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps tie_word_embeddings vocab_size"
).split()


def read_plain_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The same settings as `read_config` without the class of a family, whose import takes 80 MB of memory.

    For Llama, where the file says everything that the class has a default for; elsewhere the class is asked.
    """
    with told_plainly("the model's configuration", path):
        said, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        whole = said.keys() >= {*_SAID_IN_FULL, "rope_parameters"} and "rope_type" in (said["rope_parameters"] or {})
        if said.get("model_type") == "llama" and whole:
            return PreTrainedConfig.from_dict(said)
    return read_config(path, revision)


def load_tokenizer(
    path: str, revision: str | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, whose configuration is read for it unless it is given.

    Raises InputError when there is no tokenizer, or it has no end-of-text token.
    """
    given = {} if config is None else {"config": config}
    with told_plainly("the tokenizer", path):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, revision=revision, **given))
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token, so the model could never learn to stop",
            where=path,
            fix="set `eos_token` in tokenizer_config.json",
        )
    return tokenizer


def load_model(
    path: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None, quantize: str = "none"
) -> PreTrainedModel:
    """Loads a causal language model from safetensors.

    Raises:
        InputError: when weights are missing, are in an unsafe format, or do not fill the architecture.
    """
    from transformers import AutoModelForCausalLM

    directory = Path(path)
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise InputError(
            "there are no safetensors weights in this directory",
            where=path,
            fix="convert other formats to safetensors first; pickled weights are not loaded",
        )
    with told_plainly("the model", path):
        loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **_quantization(quantize, dtype, device),
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{len(missing)} weights are missing and would be random (first: {missing[0]})",
            where=path,
            fix="use a complete causal language model",
        )
    model = cast("PreTrainedModel", loaded)
    if quantize == "none":
        cast("nn.Module", model).to(device)
    return model.eval()


def _quantization(quantize: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if quantize == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise InputError(
            "quantized loading needs bitsandbytes", where="model.quantize", fix="pip install 'tunesmith[eight-bit]'"
        ) from error
    if quantize == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    return {"quantization_config": config, "device_map": {"": device}}


def weights_directory(path: str, revision: str | None = None) -> Path:
    """The directory of a model's safetensors files; those of a hub id are fetched.

    Raises:
        InputError: when they cannot be had.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    with told_plainly("the model", path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any, location: str) -> set[int]:
    """Token ids that end generation: the tokenizer's end-of-text, and those of the model's configuration and of the
    generation settings that lie beside it."""
    from transformers import GenerationConfig

    ids = {int(cast(int, tokenizer.eos_token_id))}
    declaring = [config]
    with suppress(OSError, ValueError):
        declaring.append(GenerationConfig.from_pretrained(location))
    for settings in declaring:
        declared = getattr(settings, "eos_token_id", None)
        ids.update(
            value for value in (declared if isinstance(declared, list) else [declared]) if isinstance(value, int)
        )
    return ids
