"""Generation: the tokens of transformers' `generate`, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from tiny import VOCABULARY, shake, tiny
from tunesmith.base import TrainingError, silent
from tunesmith.engine import decode, padded
from tunesmith.engine.cache import Cache
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.engine.lookup import Lookup
from tunesmith.engine.sampling import Asked, Chooser, Place
from tunesmith.methods.lora import Lora
from tunesmith.models.decoder import Decoder, decoder_of

FUSED = ["llama", "mistral", "qwen2", "qwen3"]
OTHERS = ["gpt2", "gemma3_text", "gpt_neox", "bloom", "lfm2", "mamba"]
NEW = 14


def texts(lengths: Sequence[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


RAGGED = texts([5, 1, 23, 40, 17, 9, 60])
# Two that begin like another, and one that occurs twice.
PROMPTS = [*RAGGED, RAGGED[3] + [5, 6, 7], RAGGED[3][:30] + [9] * 20, RAGGED[5]]


def said(model: Any, prompts: Sequence[Sequence[int]], stop_ids: set[int], batch_size: int, new: int = NEW) -> Any:
    return generate(model, prompts, Sampling(new), stop_ids=stop_ids, batch_size=batch_size, progress=silent)


def oracle(model: Any, prompts: Sequence[Sequence[int]], stop_ids: set[int], new: int = NEW) -> list[Generation]:
    """Each prompt alone, by transformers."""
    model.generation_config = GenerationConfig()
    answers = []
    for prompt in prompts:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=0)
        ids = torch.tensor([list(prompt)])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        tokens = output[0, len(prompt) :].tolist()
        end = next((at for at, token in enumerate(tokens) if token in stop_ids), None)
        answers.append(Generation(tokens[:end], "length" if end is None else "stop"))
    return answers


@pytest.mark.parametrize("architecture", FUSED + OTHERS)
def test_greedy_tokens_are_those_of_transformers(architecture: str) -> None:
    model = tiny(architecture)
    assert isinstance(decoder_of(model), Decoder) == (architecture in FUSED)
    free = oracle(model, PROMPTS, {2})
    # One row stops at once, others on their way.
    stop_ids = {2, free[2].token_ids[0], free[4].token_ids[NEW // 2]}
    expected = oracle(model, PROMPTS, stop_ids)
    assert expected[2] == Generation([], "stop") and free != expected
    assert said(model, PROMPTS, {2}, 4) == free
    for batch_size in (3, 32):
        assert said(model, PROMPTS, stop_ids, batch_size) == expected
    assert said(model, PROMPTS[:4], stop_ids, 1) == expected[:4]
    assert said(model, PROMPTS[:3], stop_ids, 2, new=1) == oracle(model, PROMPTS[:3], stop_ids, new=1)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("rwkv", {"attention_hidden_size": 32}),
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3}),
    ],
    ids=["rwkv", "recurrent_gemma"],
)
def test_architectures_with_a_past_of_their_own(architecture: str, overrides: dict[str, Any]) -> None:
    model = tiny(architecture, **overrides)
    prompts = texts([5, 9, 9, 9, 23])
    stop_ids = {2, oracle(model, prompts, {2})[2].token_ids[4]}
    assert said(model, prompts, stop_ids, 5) == oracle(model, prompts, stop_ids)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_long_prompts_are_read_in_parts(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(architecture)
    expected = oracle(model, PROMPTS, {2})
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", 18)
    assert said(model, PROMPTS, {2}, 4) == expected


def test_adapters_take_part() -> None:
    model = tiny()
    plain = said(model, PROMPTS, {2}, 4)
    Lora(rank=4, targets="all-linear").adapt(model)
    shake(model)
    answers = said(model, PROMPTS, {2}, 4)
    assert answers == oracle(model, PROMPTS, {2}) and answers != plain


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bf16_answers_are_best_within_rounding(architecture: str) -> None:
    model: Any = tiny(architecture, dtype=torch.bfloat16)
    for prompt, answer in zip(PROMPTS, said(model, PROMPTS, {2}, 4), strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer.token_ids]])
            logits = cast(Any, model)(input_ids=ids).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert bool((logits.max(1).values - chosen <= 2e-2 * logits.abs().max()).all())


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the fused path has."""
    passes: list[int] = []
    hidden = Decoder.hidden

    def record(self: Decoder, token_ids: Any, *rest: Any) -> Any:
        passes.append(len(token_ids))
        return hidden(self, token_ids, *rest)

    monkeypatch.setattr(Decoder, "hidden", record)
    return passes


def test_guesses_save_passes_and_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    decoder_of(model)
    passes = recorded(monkeypatch)
    [answer] = said(model, PROMPTS[:1], {2}, 1, new=40)
    guessed = len(passes)
    monkeypatch.setattr(decode.Lookup, "guess", lambda *_: [])
    assert said(model, PROMPTS[:1], {2}, 1, new=40) == [answer]
    assert len(passes) - guessed == 40 and guessed < 36


def test_common_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    system, rest = texts([100, *range(3, 11)])[0], texts([100, *range(3, 11)])[1:]
    prompts = [system + end for end in rest]
    expected = oracle(model, prompts, {2}, new=1)
    decoder_of(model)
    passes = recorded(monkeypatch)
    for batch_size in (1, 8):
        passes.clear()
        assert said(model, prompts, {2}, batch_size, new=1) == expected
        assert sum(passes) == 100 + sum(map(len, rest))


def test_common_beginnings_of_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("gpt2")
    # The last row is shorter than what another adds to the beginning.
    prompts = [RAGGED[6] + end for end in texts([3, 90, 70, 1])] + [RAGGED[6][:50]]
    answers = padded.PaddedAnswers(model, Asked(prompts, range(5), Sampling(NEW), {2}, 5))

    def read_before() -> int:
        return answers._begin(range(5), torch.device("cpu"))[1]["past_key_values"].get_seq_length()

    assert read_before() == 0
    monkeypatch.setattr(padded, "WORTH_SHARING", 64)
    assert read_before() == 49
    assert said(model, prompts, {2}, 5) == oracle(model, prompts, {2})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_depend_on_the_seed_and_not_on_the_batch(architecture: str, top_p: float) -> None:
    model = tiny(architecture)

    def sampled(seed: int, batch_size: int) -> list[Generation]:
        torch.manual_seed(seed)
        sampling = Sampling(NEW, temperature=1.0, top_p=top_p)
        return generate(model, PROMPTS, sampling, stop_ids={2}, batch_size=batch_size, progress=silent)

    first = sampled(0, 1)
    assert sampled(0, 4) == first and sampled(0, 32) == first
    assert sampled(1, 4) != first
    assert first[5] != first[9], "the same prompt twice draws twice"


def asked(sampling: Sampling) -> Asked:
    return Asked([], [], sampling, {2}, 1)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, float("-inf")]])
    rows = 8_000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.5, 0.9), (1.0, 0.6)):
        torch.manual_seed(0)
        chooser = Chooser(asked(Sampling(1, temperature=temperature, top_p=top_p)))
        places = [Place(number, 0) for number in range(rows)]
        chosen = torch.tensor(chooser.choose(logits.expand(rows, -1).clone(), places))
        warped = cast(Any, TopPLogitsWarper(top_p))(torch.zeros(1, 1, dtype=torch.long), logits / temperature)
        expected = torch.softmax(warped[0], 0)
        found = chosen.bincount(minlength=5) / rows
        assert torch.allclose(found, expected, atol=0.025) and not bool(found[expected == 0].any())


def test_a_cut_that_more_than_the_most_probable_tokens_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.engine import sampling

    logits, places = torch.randn(4, VOCABULARY), [Place(number, 0) for number in range(4)]

    def chosen() -> list[int]:
        torch.manual_seed(0)
        return Chooser(asked(Sampling(1, temperature=1.0, top_p=0.95))).choose(logits.clone(), places)

    whole = chosen()
    monkeypatch.setattr(sampling, "PROBABLE", 3)
    assert chosen() == whole


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dead_model_is_told_and_left_as_it_was(architecture: str, temperature: float) -> None:
    model: Any = tiny(architecture)
    model.train()
    model.set_attn_implementation("eager")
    said(model, PROMPTS[:2], {2}, 2)
    assert model.training and model.config._attn_implementation == "eager"
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        sampling = Sampling(NEW, temperature=temperature)
        generate(model, PROMPTS[:2], sampling, stop_ids={2}, batch_size=2, progress=silent)
    assert model.training and model.config._attn_implementation == "eager"


def test_progress_counts_answers() -> None:
    seen: list[tuple[str, int, int | None]] = []
    prompts = PROMPTS[:3]
    generate(
        tiny(), prompts, Sampling(2), stop_ids={2}, batch_size=2, progress=lambda *state: seen.append(tuple(state))
    )
    assert seen == [("answering", done, 3) for done in range(4)]
    assert generate(tiny(), [], Sampling(2), stop_ids={2}, batch_size=2, progress=silent) == []


def test_lookup_prefers_the_longest_and_the_latest_match() -> None:
    lookup = Lookup()
    lookup.learn([1, 2, 3, 4, 9, 2, 3, 5], 0)
    assert lookup.guess([7, 2, 3], 2) == [5]
    assert lookup.guess([1, 2, 3], 2) == [4, 9]
    assert lookup.guess([8], 2) == []
    lookup.learn([2, 3, 6], 2)
    assert lookup.guess([2, 3], 1) == [6]


def test_cache_grows_and_hands_beginnings_on() -> None:
    cache = Cache(layers=1, slots=2, longest=100)
    key = torch.randn(3, 2, 4)
    cache.reserve(3)
    cache.write(0, cache.places([1], [0], [3]), key, -key)
    cache.reserve(50)
    cache.copy(1, 0, 2)
    keys, values = cache.read(0, [0, 1], 3)
    assert torch.equal(keys[1], key) and torch.equal(values[0, :2], -key[:2]) and not bool(keys[0, 2].any())
