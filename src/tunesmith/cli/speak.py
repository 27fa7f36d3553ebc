"""`tunesmith generate` and `tunesmith chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.engine.generate import Sampling

if TYPE_CHECKING:
    from tunesmith.pipeline.labeller import Said


def print_answers(
    target: str, prompts: Sequence[str], sampling: Sampling, *, system: str | None, as_json: bool
) -> None:
    """Answers every prompt on its own."""
    from tunesmith.pipeline.loaded import load_labeller, load_speaker

    quiet_libraries()
    with Display(as_json) as display:
        labeller = load_labeller(target, progress=display.progress)
        if labeller is not None:
            if system is not None:
                raise InputError("a model that judges takes no system turn", where="--system", fix="remove it")
            _print_labels(prompts, labeller.say(prompts, display.progress), as_json=as_json)
            return
        speaker = load_speaker(target, progress=display.progress)
        conversations = [_opened(system, prompt) for prompt in prompts]
        answers = speaker.answer(conversations, sampling, display.progress)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = speaker.text(answer.token_ids)
        if as_json:
            line = {
                "prompt": prompt,
                "text": text,
                "tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
            }
            out(json.dumps(line, ensure_ascii=False))
        else:
            out(text)
            if answer.finish_reason == "length":
                print(f"(cut off at {sampling.max_new_tokens} tokens)", file=sys.stderr)


def _print_labels(prompts: Sequence[str], said: Sequence[Said], *, as_json: bool) -> None:
    """What a model that judges says of each prompt."""
    for prompt, judged in zip(prompts, said, strict=True):
        if as_json:
            line = {"prompt": prompt, "label": judged.answer, "probability": judged.probability}
            out(json.dumps(line, ensure_ascii=False))
        else:
            out(judged.answer if judged.probability is None else f"{judged.answer}  ({judged.probability:.1%})")


def converse(target: str, sampling: Sampling, *, system: str | None) -> None:
    """A conversation on the terminal."""
    from tunesmith.pipeline.loaded import load_speaker

    quiet_libraries()
    with Display() as display:
        speaker = load_speaker(target, progress=display.progress)
    messages = _opened(system, None)
    while True:
        try:
            said = input("you: " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not said.strip():
            break
        messages.append({"role": "user", "content": said})
        [answer] = speaker.answer([messages], sampling)
        text = speaker.text(answer.token_ids)
        out(f"model: {text}" if sys.stdin.isatty() else text)
        messages.append({"role": "assistant", "content": text})


def _opened(system: str | None, prompt: str | None) -> list[dict[str, Any]]:
    turns = [("system", system), ("user", prompt)]
    return [{"role": role, "content": text} for role, text in turns if text is not None]
