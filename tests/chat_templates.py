"""Chat templates as models ship them, and small tokenizers that know their control tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.models.templates import NAMED_TEMPLATES

Kind = Literal["bytes", "metaspace", "llama-2"]

CORPUS = [
    "What is the capital of France? The capital of France is Paris. Answer: Paris is the answer.",
    "user assistant system model Hello there, how are you today? I am fine, thanks. the end of the turn",
    "SELECT name FROM people WHERE age = 3; SELECT COUNT city FROM t",
] * 20


@lru_cache(maxsize=32)
def tokenizer(
    controls: tuple[str, ...],
    bos: str | None,
    eos: str,
    template: str | None,
    kind: Kind = "bytes",
    rstrip: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama-3, Qwen and GPT-2 have it, or one of the two ways in which sentencepiece is rebuilt."""
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        alphabet = sorted({character for text in CORPUS for character in text} | {"▁"})
        if kind == "metaspace":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            inner.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        else:
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            inner.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
    fallback = [] if kind == "bytes" else ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=fallback, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    inner.train_from_iterator(CORPUS, trainer)
    if fallback:  # the trainer marks all of them as special, but the bytes are ordinary pieces
        bare: dict[str, Any] = json.loads(inner.to_str())
        bare["added_tokens"] = [token for token in bare["added_tokens"] if token["content"] == "<unk>"]
        inner = Tokenizer.from_str(json.dumps(bare))
    inner.add_special_tokens([AddedToken(text, rstrip=rstrip, normalized=False) for text in controls])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def published(name: str) -> str:
    """A template from TRL's collection of those that models ship; TRL itself is not imported."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

DEEPSEEK_V3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its control tokens, and what it writes after an answer.

    Attributes:
        header: what stands between a question and its answer.
        ending: what closes an answer, and is trained on with it.
        lead: what an answer opens with besides what is said; trained on.
        rewrites: whether an earlier answer is written in another way than the last one.
        closes: whether the template itself closes the last answer, and not the turn after it.
        stops: tokens besides the end-of-text at which the model's generation stops.
    """

    template: str
    controls: tuple[str, ...]
    bos: str | None
    eos: str
    ending: str
    lead: str = ""
    kind: Kind = "bytes"
    rstrip: bool = False
    rewrites: bool = False
    closes: bool = True
    stops: tuple[str, ...] = ()

    def stop_ids(self) -> set[int]:
        """What the model's generation settings would list."""
        return set(self.tokenizer().convert_tokens_to_ids([self.eos, *self.stops]))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer(self.controls, self.bos, self.eos, self.template, self.kind, self.rstrip)


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI_3 = ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
SENTENCEPIECE = ("<s>", "</s>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
GLM_4 = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")

FAMILIES: dict[str, Family] = {
    "chatml": Family(NAMED_TEMPLATES["chatml"], IM, None, "<|im_end|>", "<|im_end|>"),
    # the stop token that the tokenizer names is not the one that the template writes
    "chatml-base": Family(NAMED_TEMPLATES["chatml"], IM, None, "<|endoftext|>", "<|im_end|>"),
    "llama-3": Family(published("llama3"), LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "llama-3-base": Family(NAMED_TEMPLATES["llama-3"], LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "mistral": Family(MISTRAL, SENTENCEPIECE, "<s>", "</s>", "</s>", lead=" ", kind="llama-2"),
    "mistral-metaspace": Family(MISTRAL, SENTENCEPIECE, "<s>", "</s>", "</s>", lead=" ", kind="metaspace"),
    "gemma": Family(published("gemma"), GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma-named": Family(NAMED_TEMPLATES["gemma"], GEMMA, "<bos>", "<eos>", "<end_of_turn>"),
    "phi-3": Family(published("phi3"), PHI_3, "<s>", "<|endoftext|>", "<|end|>", kind="llama-2", rstrip=True),
    "zephyr": Family(NAMED_TEMPLATES["zephyr"], SENTENCEPIECE, "<s>", "</s>", "</s>", kind="llama-2"),
    "qwen2.5": Family(published("qwen2_5"), IM, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(
        published("qwen3"), IM, None, "<|im_end|>", "<|im_end|>", lead="<think>\n\n</think>\n\n", rewrites=True
    ),
    "deepseek-v3": Family(DEEPSEEK_V3, DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], DEEPSEEK[1]),
    "glm-4": Family(
        published("glm4moe"),
        GLM_4,
        None,
        "<|user|>",
        "<|user|>",
        lead="\n<think></think>\n",
        closes=False,
        stops=("<|observation|>",),
    ),
    "gpt-oss": Family(
        published("gptoss"),
        HARMONY,
        None,
        "<|return|>",
        "<|return|>",
        lead="<|channel|>final<|message|>",
        rewrites=True,
    ),
}

KEEPING = [name for name, family in FAMILIES.items() if not family.rewrites]
"""Families in which every answer can be trained on as the model would give it."""
