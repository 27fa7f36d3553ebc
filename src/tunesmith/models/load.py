"""The door to transformers: configurations, weights and tokenizers, every failure said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, silent
from tunesmith.models.quantized import (
    Quantization,
    loading_options,
    settle_layers,
    settled_quantization,
    stored_quantization,
)

if TYPE_CHECKING:  # models take seconds to import, and those who count tokens need none
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from tunesmith.models.task_head import SettledPooling, TaskHead

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
    progress(f"asking the model hub for {path}", 0, None)
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
    path: str, revision: str | None = None, config: PreTrainedConfig | None = None, *, writes: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, whose configuration is read for it unless it is given.

    Raises InputError when there is no tokenizer, or it has no end-of-text token for a model that ``writes``.
    """
    given = {} if config is None else {"config": config}
    with told_plainly("the tokenizer", path):
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(path, revision=revision, **given))
    if writes and tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token, so the model could never learn to stop",
            where=path,
            fix="set `eos_token` in tokenizer_config.json",
        )
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    quantized: Quantization | None = None,
) -> PreTrainedModel:
    """Loads a causal language model from safetensors.

    Args:
        quantized: how weights of linear layers are held; each is quantized as it is read. Weights that are stored
            quantized are held as they are.

    Raises:
        InputError: when weights are missing, are in an unsafe format, do not fill the architecture, or are stored in
            another quantization.
    """
    from transformers import AutoModelForCausalLM

    how = Loading(dtype, device, revision, quantized)
    model, missing = _from_files(AutoModelForCausalLM, path, how)
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing and would be random (first: {missing[0]})",
            where=path,
            fix="use a complete causal language model",
        )
    return model


def load_trunk(path: str, how: Loading) -> PreTrainedModel:
    """Loads a model without any head, such as a sentence encoder; a pooler that its files lack is nobody's.

    Raises:
        InputError: as `load_model`.
    """
    from transformers import AutoModel

    model, missing = _from_files(AutoModel, path, how)
    if lost := [name for name in missing if ".pooler." not in f".{name}"]:
        raise InputError(
            f"{len(lost)} weights are missing and would be random (first: {lost[0]})",
            where=path,
            fix="use a model whose files are complete",
        )
    return model


@dataclass(frozen=True)
class Loading:
    """How weights are held: their dtype, where, of which revision, and quantized or not."""

    dtype: torch.dtype
    device: torch.device
    revision: str | None = None
    quantized: Quantization | None = None


class Judge(NamedTuple):
    """A trunk with a head for a task.

    Attributes:
        model: its head is in fp32.
        head: with its pooling settled.
        is_new: whether the head was drawn anew.
        settled: how the pooling was settled.
    """

    model: PreTrainedModel
    head: TaskHead
    is_new: bool
    settled: SettledPooling


def load_judge(path: str, head: TaskHead, how: Loading) -> Judge:
    """Loads a trunk with a head for a task.

    The head is new, drawn from torch's random state, unless the files hold one for the same labels.

    Raises:
        InputError: as `load_model`, and when the trunk's own weights are missing.
    """
    from tunesmith.models.task_head import (
        HEAD_MODULES,
        draw_anew,
        head_modules,
        model_class,
        refuse_another_head,
        remember_head,
        saved_head,
        settled_pooling,
    )

    found = saved_head(Path(path)) if Path(path).is_dir() else None
    same = found is not None and (found.kind, found.labels) == (head.kind, head.labels)
    model, missing = _from_files(
        model_class(head), path, how, HEAD_MODULES, **head.settings(), ignore_mismatched_sizes=not same
    )
    own = tuple(f"{name}." for name in head_modules(model))
    how_pooled = settled_pooling(head, model, missing, path, how.revision)
    unused = [name for name in missing if ".pooler." in name and how_pooled.pooling != "pooler"]
    if lost := [name for name in missing if not name.startswith(own) and name not in unused]:
        raise InputError(
            f"{len(lost)} weights are missing and would be random (first: {lost[0]})",
            where=path,
            fix="use a model whose files are complete",
        )
    new = not same or any(name.startswith(own) for name in missing)
    for name in head_modules(model):
        module = model.get_submodule(name).float()
        if new:  # a file may hold a head of the same size for other labels
            draw_anew(module, float(getattr(model.config, "initializer_range", 0.02)))
    settled = replace(head, pooling=how_pooled.pooling)
    refuse_another_head(model, settled)
    remember_head(model, settled)
    return Judge(model, settled, new, how_pooled)


def _from_files(
    kind: Any, path: str, how: Loading, skip: Sequence[str] = (), **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model of a class of transformers, and the names of weights that its files lack."""
    directory = Path(path)
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise InputError(
            "there are no safetensors weights in this directory",
            where=path,
            fix="convert other formats to safetensors first; pickled weights are not loaded",
        )
    config = read_config(path, how.revision)
    held = settled_quantization(how.quantized, config, path)
    with told_plainly("the model", path):
        loaded, info = kind.from_pretrained(
            path,
            revision=how.revision,
            dtype=how.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **loading_options(held, stored_quantization(config) is not None, how.dtype, how.device, skip),
            **settings,
        )
    model = cast("PreTrainedModel", loaded)
    if held is None:
        cast("nn.Module", model).to(how.device)
    settle_layers(cast("nn.Module", model), how.dtype)
    return model.eval(), sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})


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
