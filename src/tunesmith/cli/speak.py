"""`tunesmith generate` and `tunesmith chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.engine.generate import Sampling

if TYPE_CHECKING:
    from tunesmith.pipeline.labeller import Said
    from tunesmith.pipeline.loaded import Speaker
    from tunesmith.recipe_ladder import RankerName
    from tunesmith.retrieve import Passage


@dataclass(frozen=True)
class Search:
    """Where answers are looked up.

    Attributes:
        corpus: a file or directory.
        ranker: bm25, dense or hybrid.
    """

    corpus: str
    ranker: RankerName

    @classmethod
    def asked(cls, corpus: str | None, ranker: RankerName | None) -> Search | None:
        """What two options come to; None without a corpus."""
        if corpus is None and ranker is not None:
            raise InputError("there is nothing to search", where="--retrieval", fix="name it with --corpus")
        return None if corpus is None else cls(corpus, ranker or "bm25")


def print_answers(
    target: str,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    system: str | None,
    search: Search | None = None,
    as_json: bool,
) -> None:
    """Answers every prompt on its own, behind passages where there is a corpus."""
    from tunesmith.pipeline.loaded import load_labeller, load_speaker

    quiet_libraries()
    with Display(as_json) as display:
        labeller = load_labeller(target, progress=display.progress)
        if labeller is not None:
            if system is not None:
                raise InputError("a model that judges takes no system turn", where="--system", fix="remove it")
            if search is not None:
                raise InputError("a model that judges reads no passages", where="--corpus", fix="remove it")
            _print_labels(prompts, labeller.say(prompts, display.progress), as_json=as_json)
            return
        speaker = load_speaker(target, progress=display.progress)
        asked, found = (list(prompts), None) if search is None else _looked_up(speaker, prompts, search, display)
        conversations = [_opened(system, prompt) for prompt in asked]
        answers = speaker.answer(conversations, sampling, display.progress)
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = speaker.text(answer.token_ids)
        if as_json:
            line = {
                "prompt": prompt,
                "text": text,
                "tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
                **({} if found is None else {"passages": [vars(passage) for passage in found[at]]}),
            }
            out(json.dumps(line, ensure_ascii=False))
        else:
            out(text)
            for passage in found[at] if found is not None else ():
                print(f"(from {passage.source})", file=sys.stderr)
            if answer.finish_reason == "length":
                print(f"(cut off at {sampling.max_new_tokens} tokens)", file=sys.stderr)


def _looked_up(
    speaker: Speaker, prompts: Sequence[str], search: Search, display: Display
) -> tuple[list[str], list[list[Passage]]]:
    """Every prompt behind what was found for it, and what that was."""
    from tunesmith.pipeline.retrieving import Indexes, behind_passages, open_library
    from tunesmith.recipe_ladder import LadderSpec

    usual = LadderSpec()
    indexes = Indexes(str(usual.encoder), speaker.model.device, display.progress)
    library = open_library(search.corpus, speaker.tokenizer, indexes, usual.passage_tokens)
    found = [library.find(search.ranker, prompt, usual.passages) for prompt in prompts]
    asked = [behind_passages(one, own, usual.passages_prompt) for one, own in zip(prompts, found, strict=True)]
    return asked, found


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
