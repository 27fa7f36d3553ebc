"""LLaMA-Factory's data sets: `dataset_info.json` says where each one is and how its rows are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.recipe_import.job import LOUD, Job
from tunesmith.recipe_import.llamafactory_stages import PAIRS
from tunesmith.recipe_import.trainer_settings import DataSource, pretrains, put_data

INFO = "dataset_info.json"
ALPACA_PARTS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
TAGS = {
    "role_tag": ("from", ("from", "role")),
    "content_tag": ("value", ("value", "content")),
    "user_tag": ("human", ("human", "user")),
    "assistant_tag": ("gpt", ("gpt", "assistant")),
    "observation_tag": ("observation", ("observation", "tool")),
    "function_tag": ("function_call", ("function_call",)),
    "system_tag": ("system", ("system",)),
}
"""Their default, and the names that are read here."""
CHAT_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
UNREAD_PARTS = ("history", "tools", "images", "videos", "audios")

TEMPLATES = {
    "chatml": ("chatml", ""),
    "llama3": ("llama-3", ""),
    "gemma": ("gemma", "a system turn has a turn of its own here, and stands in the first user turn there"),
    "zephyr": ("zephyr", f"{LOUD}there every conversation gets a system turn, and turns end without a line break"),
    "empty": ("plain", f"{LOUD}answers end with the end-of-text token here, and with none there"),
}
TEXT_LAYOUTS = ("alpaca", "default", "fewshot", "vicuna")
"""Templates that are no model's own chat template."""


def data(job: Job) -> None:
    """Raises InputError when no data set is named, or its description is malformed."""
    names = job.texts("dataset")
    if not names:
        job.refuse("dataset", "no data set is named", "the recipe needs rows: name them under `dataset:`")
    raw = job.text("stage") == "pt"
    info, place = _info(job)
    notes: list[str] = []
    sources = [_source(job, name, info, place, raw=raw, notes=notes, key="dataset") for name in names]
    sources = _mixed(job, sources)
    judged = job.texts("eval_dataset")
    validation, doubts = None, list[str]()
    if judged:
        if (job.number("val_size") or 0) > 0:
            job.refuse("eval_dataset", "val_size and eval_dataset exclude each other", "remove one of them")
        validation = _source(job, judged[0], info, place, raw=raw, notes=doubts, key="eval_dataset")
        if len(judged) > 1:
            doubts.append(f"{LOUD}one file holds the validation rows, and only the first one is used")
        if info and info[judged[0]].get("split", "train") != "train":
            # The train split in its place would validate on what is trained on.
            validation, doubts = None, [f"{LOUD}only a file can hold the validation rows: save that split to one"]
    trouble = put_data(job, sources, validation)
    doubts += [LOUD + trouble] if trouble else []
    job.say("dataset", "translated", "data.train", _joined(notes))
    job.say(
        "eval_dataset",
        "translated" if validation else "no counterpart",
        "data.validation" if validation else None,
        _joined(doubts),
    )
    if info is not None:
        job.say("dataset_dir", "translated", "data.train", f"paths and columns are those of {place / INFO}")
    else:
        job.say("dataset_dir", "no counterpart", note=f"{LOUD}there is no {place / INFO} to look the data sets up in")


def _joined(notes: Sequence[str]) -> str:
    unique = list(dict.fromkeys(notes))
    quiet = [note.removeprefix(LOUD) for note in unique]
    return (LOUD if any(note.startswith(LOUD) for note in unique) else "") + "; ".join(quiet)


def _info(job: Job) -> tuple[dict[str, Any] | None, Path]:
    """The table of data sets and the folder it describes.

    LLaMA-Factory looks from where it is started, which a file does not say: so from here, then from the file's own
    folder, and from the folders above that one.
    """
    folder = job.get("dataset_dir")
    named = Path(folder) if isinstance(folder, str) else Path("data")
    if folder is not None and not isinstance(folder, str):
        job.unfit("dataset_dir", "a path")
    for base in (Path(), job.folder, *list(job.folder.parents)[:3]):
        path = base / named / INFO
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from error
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"the table of data sets cannot be read: {error}", where=path) from error
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            raise InputError("this is not a table of data sets by name", where=path)
        return value, path.parent
    return None, named


def _source(
    job: Job, name: str, info: dict[str, Any] | None, place: Path, *, raw: bool, notes: list[str], key: str
) -> DataSource:
    if info is None:
        notes.append(
            f"{LOUD}{place / INFO} is needed to know where the rows of {name!r} are and how they are written: put the "
            "path in the place of the name"
        )
        return DataSource(name, "text" if raw else "auto")
    if name not in info:
        job.refuse(key, f"{place / INFO} has no data set {name!r}{nearest(name, list(info))}")
    entry: dict[str, Any] = info[name]
    if bool(entry.get("ranking")) != (job.text("stage") in PAIRS):
        what = "holds preference pairs (ranking)" if entry.get("ranking") else "holds no preference pairs (ranking)"
        job.refuse(key, f"{name!r} {what}, and this is the stage {job.text('stage') or 'sft'}", "name another data set")
    path = _path(entry, name, place, notes)
    formatting = entry.get("formatting") or "alpaca"
    given = entry.get("columns")
    if given is not None and not isinstance(given, dict):
        raise InputError("columns are names by part", where=f"{place / INFO} {name}.columns")
    columns = {part: str(column) for part, column in (given or {}).items() if column}
    for part in UNREAD_PARTS:
        if part in columns:
            notes.append(f"{LOUD}the column {columns[part]!r} ({part}) of {name!r} is not read")
    for setting, why in (
        ("subset", "the default configuration"),
        ("folder", "all folders"),
        ("num_samples", "all rows"),
    ):
        if entry.get(setting):
            notes.append(f"{LOUD}{setting} of {name!r} has no counterpart, {why} will be read")
    if entry.get("split", "train") != "train":
        notes.append(f"{LOUD}the train split of {name!r} is read, and not {entry['split']!r}")
    if raw:
        text = columns.get("prompt", "instruction" if given is None else "text")
        return DataSource(path, "text", {} if text == "text" else {"text": text})
    if entry.get("ranking"):
        return _pairs(path, entry, columns, formatting, name, notes)
    if job.text("stage") == "kto":
        if formatting != "alpaca":
            job.refuse(
                key, f"{name!r} holds conversations with a label", "write prompt, completion and label into columns"
            )
        return _labelled(path, columns, notes)
    if formatting == "alpaca":
        return _alpaca(path, columns if given is not None else None, notes)
    return _turns(path, entry, columns, name, notes)


def _path(entry: dict[str, Any], name: str, place: Path, notes: list[str]) -> str:
    if entry.get("hf_hub_url"):
        return str(entry["hf_hub_url"])
    if entry.get("file_name"):
        return str(place / str(entry["file_name"]))
    for source in ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"):
        if entry.get(source):
            notes.append(f"{LOUD}rows are read from files and the Hugging Face hub, and not from {source}: fetch them")
            return str(entry[source])
    notes.append(f"{LOUD}{INFO} does not say where {name!r} is")
    return name


def _alpaca(path: str, columns: dict[str, str] | None, notes: list[str]) -> DataSource:
    """Without `columns` theirs are the usual names; with them every part that is not named is left out."""
    if columns is None or "query" in columns:
        notes.append(f"{LOUD}instruction and input are joined by an empty line here, and by a line break there")
    if columns is None:
        return DataSource(path, "alpaca")
    mapped = {ours: columns[theirs] for theirs, ours in ALPACA_PARTS.items() if theirs in columns}
    return DataSource(path, "alpaca", mapped)


def _pairs(
    path: str, entry: dict[str, Any], columns: dict[str, str], formatting: str, name: str, notes: list[str]
) -> DataSource:
    """A prompt, or turns, with two answers behind."""
    mapped = {side: columns.get(side, side) for side in ("chosen", "rejected")}
    if formatting != "alpaca":
        turns = _turns(path, entry, columns, name, notes)
        prompt = turns.columns.get(next(iter(turns.columns), ""), "conversations")
        mapped["prompt"] = columns.get("messages", prompt)
        if "system" in columns:
            mapped["system"] = columns["system"]
        return DataSource(path, "preference", mapped)
    mapped["instruction"] = columns.get("prompt", "instruction")
    if "query" in columns:
        mapped["input"] = columns["query"]
        notes.append(f"{LOUD}instruction and input are joined by an empty line here, and by a line break there")
    if "system" in columns:
        mapped["system"] = columns["system"]
    return DataSource(path, "preference", mapped)


def _labelled(path: str, columns: dict[str, str], notes: list[str]) -> DataSource:
    """A prompt, an answer, and whether it is a good one."""
    prompt = columns.get("prompt", "instruction")
    if "query" in columns:
        prompt = f"{{{prompt}}}\n{{{columns['query']}}}"
        notes.append(f"{LOUD}a row without {columns['query']!r} has a line break behind its prompt")
    mapped = {
        "prompt": prompt,
        "completion": columns.get("response", "output"),
        "label": columns.get("kto_tag", "label"),
    }
    return DataSource(path, "unpaired", mapped | ({"system": columns["system"]} if "system" in columns else {}))


def _turns(path: str, entry: dict[str, Any], columns: dict[str, str], name: str, notes: list[str]) -> DataSource:
    given = entry.get("tags")
    tags = given if isinstance(given, dict) else {tag: usual for tag, (usual, _) in TAGS.items()}
    strange = [f"{tag}: {value}" for tag, value in tags.items() if tag in TAGS and value not in TAGS[tag][1]]
    if strange:
        notes.append(f"{LOUD}the turns of {name!r} have names that are not known here ({', '.join(map(str, strange))})")
    chat = all(tags.get(tag) == value for tag, value in CHAT_TAGS.items())
    format_name, own = ("messages", "messages") if chat else ("sharegpt", "conversations")
    turns = columns.get("messages", "conversations")
    mapped = {} if turns == own else {own: turns}
    if "system" in columns and not chat:
        mapped = {own: turns, "system": columns["system"]}
    elif "system" in columns:
        notes.append(f"{LOUD}the column {columns['system']!r} (system) of {name!r} is not read")
    return DataSource(path, format_name, mapped)


def _mixed(job: Job, sources: list[DataSource]) -> list[DataSource]:
    """`concat` uses every row once, as data without weights does; `interleave` draws by shares."""
    strategy = job.text("mix_strategy")
    shares = job.texts("interleave_probs")
    if strategy is None or not strategy.startswith("interleave"):
        job.say("mix_strategy", "taken", "data.train", "every row once an epoch")
        job.say("interleave_probs", "ignored", note="read only when interleaving")
        return sources
    weights = [1.0] * len(sources)
    if shares is not None:
        try:
            weights = [float(share) for share in shares]
        except ValueError:
            job.unfit("interleave_probs", "numbers")
        if len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
            job.unfit("interleave_probs", "a positive number for every data set")
    note = f"{LOUD}the shares are kept, but an epoch has as many rows as all data sets together"
    job.say("mix_strategy", "translated", "data.train", note)
    job.say("interleave_probs", "translated", "data.train", "the weights of the data sets")
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def template(job: Job) -> None:
    if pretrains(job):
        for key in ("template", "default_system"):
            job.say(key, "ignored", note="raw text has none")
        return
    if (system := job.text("default_system")) is not None:
        job.put("data.system", system, "default_system")
    name = job.text("template")
    if name is None:
        return
    if job.recipe.get("data.template") == "plain":
        job.say("template", "ignored", "data.template", "raw text has none")
        return
    if name in TEMPLATES:
        ours, note = TEMPLATES[name]
        job.put("data.template", ours, "template", note)
    elif name in TEXT_LAYOUTS:
        job.put(
            "data.template", "auto", "template", f"{LOUD}this text layout is not known; it is the model's own template"
        )
    else:
        job.put(
            "data.template",
            "auto",
            "template",
            f"the model's own template, there a copy for {name!r} that may add a system turn: compare one row",
        )


def length(job: Job) -> None:
    """Theirs cuts question and answer in proportion, ours the end of the answer only."""
    blocks = pretrains(job)
    packed = bool(job.flag("packing") or job.flag("neat_packing")) and not blocks
    limit = job.whole("cutoff_len", least=2)
    cut = "the end of the answer is cut; LLaMA-Factory cuts the question too"
    if limit is None:
        job.default(
            "data.max_length", 2048 - packed, "cutoff_len is absent" + (", packing takes one" if packed else "")
        )
    elif blocks:
        job.put("data.max_length", limit, "cutoff_len", "tokens of a block")
    else:
        job.put("data.max_length", limit - packed, "cutoff_len", cut + ("; packing takes one token" if packed else ""))
        job.say("cutoff_len", "translated", "data.max_length, data.overlong", cut)
    if not blocks:
        job.default("data.overlong", "truncate", cut)
