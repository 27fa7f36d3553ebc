"""A causal language model of the Llama shape whose matrices stay in their files: one block is in memory at a time.

The tree of modules has transformers' names, so that methods, checkpoints and adapters find what they know, and
`Decoder` computes from it what it computes from transformers' own modules. Nothing of transformers' modeling is
imported: that alone takes more memory than everything else here.

A block's forward pass keeps its input and nothing else. The backward pass goes from the last block to the first, reads
each again, computes its forward pass with a graph and goes back through it (Chen et al. 2016, in segments of a block).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tunesmith.base import InputError
from tunesmith.models.decoder import FAMILIES, GATES, decoder_without_comparison
from tunesmith.models.streamed_head import FileEmbedding, FileHead, nothing_of, unread_linear
from tunesmith.models.weight_files import WeightFiles

STREAMED = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Families whose blocks are read one at a time, by the `model_type` of their configuration."""
RunBlock = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A block by itself: the residual stream and nothing to be added to it, as `Decoder` has them, and both behind it."""
_SETTLED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose frequencies do not depend on how long a row is."""


def streaming_obstacle(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot be read block by block, or None when it can."""
    settings = cast(Any, config)
    if STREAMED.get(settings.model_type) not in FAMILIES:
        return f"models of the kind {settings.model_type!r} cannot be read block by block ({', '.join(STREAMED)} can)"
    if settings.hidden_act not in GATES:
        return f"its gate is {settings.hidden_act}"
    if settings.rope_parameters["rope_type"] not in _SETTLED_ROTARY:
        return f"its rotary positions are of the kind {settings.rope_parameters['rope_type']!r}"
    return "it uses attention dropout" if getattr(settings, "attention_dropout", 0.0) else None


class _Attention(nn.Module):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = _window(config, number)
        biased = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
        queries, keys = (self.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = unread_linear(config.hidden_size, queries, bias=biased)
        self.k_proj = unread_linear(config.hidden_size, keys, bias=biased)
        self.v_proj = unread_linear(config.hidden_size, keys, bias=biased)
        self.o_proj = unread_linear(queries, config.hidden_size, bias=biased and config.model_type != "qwen2")
        if config.model_type == "qwen3":
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)


def _window(config: Any, number: int) -> int | None:
    if config.model_type == "mistral":
        return config.sliding_window
    kinds = getattr(config, "layer_types", None)
    return config.sliding_window if kinds and kinds[number] == "sliding_attention" else None


class _FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        biased = getattr(config, "mlp_bias", False)
        self.gate_proj = unread_linear(config.hidden_size, config.intermediate_size, bias=biased)
        self.up_proj = unread_linear(config.hidden_size, config.intermediate_size, bias=biased)
        self.down_proj = unread_linear(config.intermediate_size, config.hidden_size, bias=biased)


class _Block(nn.Module):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, number)
        self.mlp = _FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class _Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) with frequencies as transformers computes them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        settings = config.rope_parameters
        if settings["rope_type"] == "default":
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._turns = 1.0 / (settings["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width))
            self._factor = 1.0
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            self._turns, self._factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, torch.device("cpu"))

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self._turns
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._factor).to(hidden.dtype), (angles.sin() * self._factor).to(hidden.dtype)


class _Backbone(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = FileEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, number) for number in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = _Rotary(config)
        self.resident: ResidentBlock | None = None


class StreamedModel(nn.Module):
    """The modules of a causal language model; their matrices hold nothing until `load_streamed` ties them to files.

    Not on the meta device: filling a tensor there at random imports torch's compiler, which takes 70 MB.

    Attributes:
        tokens_at_once: tokens that run through it at a time; fewer are filled up to as many, because each number of
            tokens that is new to the library of narrow products costs some tens of megabytes.
    """

    generation_config = None

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        settings = cast(Any, config)
        self.config = settings
        self.tokens_at_once = 1024
        self.model = _Backbone(settings)
        self.lm_head = FileHead(settings.hidden_size, settings.vocab_size)
        if settings.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedModel:
        """Another skeleton: a copy would give every matrix memory of its own."""
        return StreamedModel(self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Blocks are computed again in the backward pass anyway."""

    def gradient_checkpointing_disable(self) -> None:
        """See above."""


def load_streamed(
    directory: Path, config: PreTrainedConfig, *, dtype: torch.dtype, tokens_at_once: int
) -> StreamedModel:
    """A model that reads its matrices from a directory when they are needed; vectors are in memory.

    Args:
        dtype: of the weights in memory, whatever the files have.

    Raises:
        InputError: when the files hold other tensors than the configuration says.
    """
    files = WeightFiles(directory)
    model = StreamedModel(config)
    model.tokens_at_once = tokens_at_once
    head = model.lm_head
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _refuse_other_tensors(directory, wanted, files.shapes(), tied=head.weight is model.model.embed_tokens.weight)
    for name, parameter in list(model.named_parameters()):
        own = nothing_of(parameter.shape, dtype)
        if parameter.dim() == 1:
            own = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            files.read(name, own)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, own)
    embedding = model.model.embed_tokens
    embedding.files, embedding.name = files, "model.embed_tokens.weight"
    tied = "lm_head.weight" not in wanted
    if tied:
        head.weight = embedding.weight
    head.files, head.name = files, embedding.name if tied else "lm_head.weight"
    model.model.resident = ResidentBlock(files, model.model.layers, dtype)
    decoder_without_comparison(model)
    return model.eval()


def _refuse_other_tensors(directory: Path, wanted: dict[str, Any], found: dict[str, Any], *, tied: bool) -> None:
    harmless = {name for name in found if name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    unknown = sorted(found.keys() - wanted.keys() - harmless)
    missing = sorted(wanted.keys() - found.keys())
    other = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    if missing or unknown or other:
        raise InputError(
            "the weights are not what config.json says: "
            f"{len(missing)} missing {missing[:1]}, {len(unknown)} unknown {unknown[:1]}, "
            f"{len(other)} of another shape {other[:1]}",
            where=directory,
            fix="use a complete causal language model, or leave budget.memory out",
        )


@contextmanager
def parts_in_memory(model: nn.Module) -> Iterator[Iterable[nn.Module]]:
    """A model's modules with their weights: the model itself, or one block after the other."""
    resident = getattr(getattr(model, "model", None), "resident", None)
    if resident is None:
        yield [model]
        return
    with resident.visiting() as blocks:
        yield blocks


class ResidentBlock:
    """The one block whose matrices are in memory.

    Args:
        blocks: as the model has them before a method puts its own layers around theirs.
    """

    def __init__(self, files: WeightFiles, blocks: nn.ModuleList, dtype: torch.dtype) -> None:
        self._files, self._blocks = files, blocks
        self._matrices = [
            {
                f"model.layers.{number}.{name}.weight": module
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear)
            }
            for number, block in enumerate(blocks)
        ]
        sizes = [sum(module.weight.numel() for module in found.values()) for found in self._matrices]
        self._memory = torch.empty(max(sizes), dtype=dtype)
        self._number: int | None = None

    @property
    def bytes(self) -> int:
        return self._memory.numel() * self._memory.element_size()

    def load(self, number: int) -> None:
        """Reads a block's matrices into the memory of the one before."""
        if number == self._number:
            return
        self.release()
        self._number = number
        at = 0
        for name, module in self._matrices[number].items():
            count = module.weight.numel()
            weight = self._memory[at : at + count].view(module.weight.shape)
            self._files.read(name, weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
            at += count

    def release(self) -> None:
        """Takes a block's matrices away from it."""
        if self._number is not None:
            for module in self._matrices[self._number].values():
                module.weight = nothing_of(module.weight.shape, module.weight.dtype)
        self._number = None

    def run(self, number: int, block: RunBlock, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a block makes of its input, its graph not kept."""
        trained = [weight for weight in self._blocks[number].parameters() if weight.requires_grad]
        return cast(Any, _Recomputed.apply(_Call(self, number, block), hidden, *trained))

    @contextmanager
    def visiting(self) -> Iterator[Iterator[nn.Module]]:
        """Every block in turn, with its matrices in memory."""

        def each() -> Iterator[nn.Module]:
            for number, block in enumerate(self._blocks):
                self.load(number)
                yield block

        try:
            yield each()
        finally:
            self.release()


class _Call:
    """A block to run, now and once more, with the random numbers and the arithmetic of the first time."""

    def __init__(self, resident: ResidentBlock, number: int, block: RunBlock) -> None:
        self._resident, self._number, self._block = resident, number, block
        self._random = torch.get_rng_state()
        self._casts = torch.is_autocast_enabled("cpu")
        self._dtype = torch.get_autocast_dtype("cpu")

    def first(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self._resident.load(self._number)
        return self._block(hidden, None)

    def again(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        now = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            with torch.enable_grad(), torch.autocast("cpu", self._dtype, enabled=self._casts):
                return self.first(hidden)
        finally:
            torch.set_rng_state(now)


class _Seeded(torch.autograd.Function):
    """A number whose gradient by the outputs of a block is what is known already.

    Gradients that are handed to torch as such are checked by a part of it that takes 34 MB to import.
    """

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return None, *ctx.gradients


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *trained: Tensor) -> Any:
        ctx.call, ctx.trained = call, trained
        ctx.save_for_backward(hidden)
        return call.first(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        (kept,) = ctx.saved_tensors
        hidden = kept.detach().requires_grad_(needed[0])
        outputs = ctx.call.again(hidden)
        wanted = [tensor for tensor, needs in zip((hidden, *ctx.trained), needed, strict=True) if needs]
        with torch.enable_grad():
            seeded = cast(Tensor, _Seeded.apply(grad_outputs, *outputs))
        found = iter(torch.autograd.grad(seeded, wanted, allow_unused=True))
        return None, *(next(found) if needs else None for needs in needed)
