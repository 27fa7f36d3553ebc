"""axolotl's `datasets`: where the rows are, how they are written, and which template they get."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.base import nearest
from tunesmith.recipe_import.axolotl_stages import row_layout
from tunesmith.recipe_import.job import LOUD, Job
from tunesmith.recipe_import.trainer_settings import DataSource, put_data

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst", ".arrow")
LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names that stand for a kind of file when the files themselves are in `data_files`."""

TEMPLATES = {"chatml": "chatml", "llama3": "llama-3", "gemma": "gemma", "tokenizer_default": "auto"}
OWN_LAYOUT = (
    "axolotl writes rows of this type in a text layout of its own, without a chat template; here they are "
    "conversations in data.template"
)


class Layout(NamedTuple):
    """How rows of one of axolotl's types are read here."""

    format: str
    columns: dict[str, str]
    note: str


def _own(columns: dict[str, str]) -> Layout:
    return Layout("prompt-completion", columns, LOUD + OWN_LAYOUT)


LAYOUTS = {
    "alpaca": Layout("alpaca", {}, LOUD + OWN_LAYOUT),
    "alpaca_chat": Layout("alpaca", {}, LOUD + OWN_LAYOUT),
    "alpaca_instruct": Layout("alpaca", {}, LOUD + OWN_LAYOUT),
    "alpaca_chat.load_qa": _own({"prompt": "question", "completion": "answer"}),
    "alpaca_chat.load_camel_ai": _own({"prompt": "message_1", "completion": "message_2"}),
    "alpaca_w_system": Layout("alpaca", {}, LOUD + OWN_LAYOUT),
    "alpaca_w_system.load_open_orca": _own({"prompt": "question", "completion": "response", "system": "system_prompt"}),
    "alpaca_w_system.load_open_orca_chatml": _own(
        {"prompt": "question", "completion": "response", "system": "system_prompt"}
    ),
    "gpteacher": Layout(
        "alpaca",
        {"instruction": "instruction", "input": "input", "output": "response"},
        f"{LOUD}{OWN_LAYOUT}; remove `input` from the columns when the rows have none",
    ),
    "oasst": _own({"prompt": "INSTRUCTION", "completion": "RESPONSE"}),
    "summarizetldr": _own({"prompt": "article", "completion": "summary"}),
}
TEXT_TYPES = {"completion": "field", "pretrain": "text_column"}
CHUNKS = f"{LOUD}long texts are cut into pieces of sequence_len there; here a longer one is cut, so split it beforehand"

QUIET = {
    "ds_type": "the file's ending says what it is",
    "trust_remote_code": "data sets that bring code are not run",
    "preprocess_shards": "only how it is worked through",
    "shards_idx": "see shards",
}
KNOWN = (
    *("path", "type", "name", "split", "data_files", "ds_type", "shards", "shards_idx", "revision", "chat_template"),
    *("chat_template_jinja", "field", "field_messages", "message_property_mappings", "roles", "roles_to_train"),
    *(
        "field_chosen",
        "field_rejected",
        "train_on_eos",
        "train_on_eot",
        "text_column",
        "skip",
        "conversation",
        "drop_system_message",
    ),
)
MESSAGE_KEYS = ("role", "content")
TURN_SETTINGS = {"train_on_eos": "turn", "train_on_eot": "turn"}
"""The value that means what happens here: the token that ends each trained answer is a target."""
ROLES = {"user": ("human", "user"), "assistant": ("gpt", "assistant"), "system": ("system",), "tool": ("tool",)}


def data(job: Job) -> None:
    """Raises InputError when no data set is named."""
    streamed = job.get("pretraining_dataset") is not None
    key = "pretraining_dataset" if streamed else "datasets"
    sources = _sources(job, key)
    if not sources:
        job.refuse(key, "no data set is named", "the recipe needs rows: name them under `datasets:`")
    if streamed:
        job.say("datasets", "ignored", note="pretraining_dataset wins over it")
    validation = _validation(job)
    if validation and (job.number("val_set_size") or 0) > 0:
        job.refuse("test_datasets", "val_set_size and test_datasets exclude each other", "remove one of them")
    trouble = put_data(job, sources, validation)
    if validation:
        job.say("test_datasets", "translated", "data.validation", LOUD + trouble if trouble else "")
    _overlong(job, only_text=all(source.format == "text" for source in sources))
    if job.recipe.get("data.template") != "plain":
        items = job.get(key)
        _template(job, key, len(items) if isinstance(items, list) else 0)
    else:
        for name in ("chat_template", "chat_template_jinja"):
            job.say(name, "ignored", note="none of these types uses it")


def _sources(job: Job, key: str) -> list[DataSource]:
    value = job.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        job.say(key, "translated", "data.train", CHUNKS)
        return [DataSource(value, "text")]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        job.unfit(key, "a list of data sets with a `path` each")
    job.say(key, "translated", "data.train")
    job.opened[key] = KNOWN
    return [
        source
        for index in range(len(value))
        for source in _source(job, f"{key}.{index}", streamed=key == "pretraining_dataset")
    ]


def _validation(job: Job) -> DataSource | None:
    if job.get("test_datasets") is None:
        return None
    sources = _sources(job, "test_datasets")
    first = sources[0]
    split = job.text("test_datasets.0.split")
    on_disk = Path(first.path).suffix.lower() in FILE_ENDINGS or job.get("test_datasets.0.ds_type") is not None
    if not on_disk or split not in (None, "train"):
        job.lose("test_datasets", "only a file can hold the validation rows: save that split to one")
        return None
    if len(sources) > 1:
        job.lose("test_datasets", "one file holds the validation rows, and only the first one is used")
    return first


def _source(job: Job, at: str, *, streamed: bool) -> list[DataSource]:
    """The sources of one item, which are several when it lists several files."""
    path = job.text(f"{at}.path")
    files = job.texts(f"{at}.data_files") or []
    if path is None and not files:
        job.refuse(at, "the data set has no path")
    where = [path] if path is not None else []
    if files and (path is None or path in LOADERS or Path(path).is_dir()):
        where = files
        job.say(f"{at}.data_files", "translated", "data.train")
        job.say(f"{at}.path", "ignored", note="the files are in data_files")
    else:
        job.say(f"{at}.path", "taken", "data.train")
        if files:
            job.lose(f"{at}.data_files", "a hub data set is used whole")
        if path and "://" in path:
            job.lose(f"{at}.path", "rows are read from files and the hub only: fetch them first", to="data.train")
    layout = _layout(job, at, "pretrain" if streamed else None)
    _sharing(job, at)
    return [replace(layout, path=str(item)) for item in where]


def _sharing(job: Job, at: str) -> None:
    split = job.text(f"{at}.split")
    if split == "train":
        job.say(f"{at}.split", "taken", "data.train", "the train split is what is read")
    elif split is not None:
        job.lose(f"{at}.split", "the whole train split is read, and no part of another one")
    for name, why in (
        ("shards", "all rows are used"),
        ("name", "a hub data set is read in its default configuration"),
        ("revision", "a hub data set is read as it is now"),
        ("skip", "all rows are used"),
    ):
        if job.get(f"{at}.{name}") not in (None, 0):
            job.lose(f"{at}.{name}", why)
    for name, why in QUIET.items():
        if job.get(f"{at}.{name}") is not None:
            job.say(f"{at}.{name}", "ignored", note=why)


def _layout(job: Job, at: str, usual: str | None) -> DataSource:
    key = f"{at}.type"
    if isinstance(job.get(key), dict):
        return _pairs_of_fields(job, key) if _compares(job) else _user_defined(job, key)
    name = job.text(key) or usual
    if (own := row_layout(job, name)) is not None:
        format_name, columns, note = own
        for part, field in (("prompt", "field_messages"), ("chosen", "field_chosen"), ("rejected", "field_rejected")):
            if (column := job.text(f"{at}.{field}")) is not None and format_name == "preference":
                columns[part] = column
                job.say(f"{at}.{field}", "translated", "data.columns")
        job.say(key, "translated", "data.format", note)
        return DataSource("", format_name, {part: name for part, name in columns.items() if part != name})
    base = (name or "").partition(":")[0]
    family = base.partition(".load")[0]
    if family in ("chat_template", "sharegpt"):
        return _conversations(job, at, family)
    if family in TEXT_TYPES:
        column = f"{at}.{TEXT_TYPES[family]}"
        field = job.text(column) or "text"
        job.say(key, "translated", "data.format", CHUNKS)
        job.say(column, "translated", "data.columns")
        return DataSource("", "text", {} if field == "text" else {"text": field})
    layout = LAYOUTS.get(base) or LAYOUTS.get(family)
    if layout:
        job.say(key, "translated", "data.format", layout.note)
        return DataSource("", layout.format, dict(layout.columns))
    known = [*LAYOUTS, *TEXT_TYPES, "chat_template", "sharegpt"]
    hint = nearest(base, known)
    job.lose(key, f"rows of the type {name!r} are not known{hint}; their format is detected, or map data.columns")
    return DataSource("")


def _compares(job: Job) -> bool:
    return job.recipe.get("objective.kind", "sft") not in ("sft", "grpo")


def _pairs_of_fields(job: Job, key: str) -> DataSource:
    """`user_defined.default`: the columns are named, and layouts are put around them."""
    sides = ("completion", "label") if job.recipe["objective.kind"] == "kto" else ("chosen", "rejected")
    columns = {part: job.text(f"{key}.field_{part}") or part for part in ("prompt", *sides)}
    if (system := job.text(f"{key}.field_system")) is not None:
        columns["system"] = system
    formats = [name for name in job.get(key) if str(name).endswith("_format")]
    note = f"{LOUD}{', '.join(formats)} are not taken over: data.template is put around the columns" if formats else ""
    job.say(key, "translated", "data.columns", note)
    format_name = "unpaired" if "label" in sides else "preference"
    return DataSource("", format_name, {part: name for part, name in columns.items() if part != name})


def _conversations(job: Job, at: str, family: str) -> DataSource:
    """Turns as `{role, content}` or `{from, value}`, under whatever name the list of turns has."""
    role, content = (_property(job, at, name) for name in MESSAGE_KEYS)
    shared = family == "sharegpt" and (role, content) == (None, None)
    pair = ("from", "value") if shared else (role or "role", content or "content")
    turns = job.text(f"{at}.field_messages") or ("conversations" if shared else "messages")
    name, own = ("messages", "messages") if pair == MESSAGE_KEYS else ("sharegpt", "conversations")
    columns = {} if turns == own else {own: turns}
    note = "axolotl no longer accepts this type; its rows are read as they were" if family == "sharegpt" else ""
    job.say(f"{at}.type", "translated", "data.format", note)
    job.say(f"{at}.field_messages", "translated", "data.columns")
    if job.get(f"{at}.conversation") is not None:
        job.lose(f"{at}.conversation", "the template of conversations is data.template")
    for mapped in ("message_property_mappings", "message_field_role", "message_field_content"):
        if pair in (MESSAGE_KEYS, ("from", "value")):
            job.say(f"{at}.{mapped}", "translated", "data.format")
        else:
            job.lose(f"{at}.{mapped}", f"turns have role and content, or from and value, and not {' and '.join(pair)}")
    for mapped in job.get(f"{at}.message_property_mappings") or {}:
        dotted = f"{at}.message_property_mappings.{mapped}"
        if mapped not in MESSAGE_KEYS and job.get(dotted) not in (None, mapped):
            job.lose(dotted, "other parts of a turn keep the name that they have in the file")
    _trained_turns(job, at)
    return DataSource("", name, columns)


def _property(job: Job, at: str, name: str) -> str | None:
    return job.text(f"{at}.message_property_mappings.{name}") or job.text(f"{at}.message_field_{name}")


def _trained_turns(job: Job, at: str) -> None:
    trained = job.texts(f"{at}.roles_to_train")
    if trained is not None and set(trained) <= {"assistant", "gpt"}:
        job.say(f"{at}.roles_to_train", "taken", "data.train_on", "the assistant's turns")
    elif trained is not None:
        job.lose(f"{at}.roles_to_train", "the assistant's turns are trained on, or every token (data.train_on)")
    for name, here in TURN_SETTINGS.items():
        value = job.text(f"{at}.{name}")
        if value == here:
            job.say(f"{at}.{name}", "taken", note="the token that ends each trained answer is a target")
        elif value is not None:
            job.lose(f"{at}.{name}", "the token that ends each trained answer is a target, and no other end is")
    roles = job.get(f"{at}.roles")
    if isinstance(roles, dict):
        fits = all(
            isinstance(names, list) and set(map(str, names)) <= set(ROLES.get(to, ())) for to, names in roles.items()
        )
        if fits:
            job.say(f"{at}.roles", "ignored", note="these names are known")
        else:
            job.lose(f"{at}.roles", "roles have their usual names: system, user or human, assistant or gpt, tool")
    for name in ("message_field_training", "message_field_training_detail", "drop_system_message", "split_thinking"):
        if job.get(f"{at}.{name}") not in (None, False):
            job.lose(f"{at}.{name}", "rows are used as they are")


def _user_defined(job: Job, key: str) -> DataSource:
    """A layout in the file itself, which templates over columns can spell."""

    def part(name: str, usual: str) -> str:
        # Read as it stands: white space at its end is part of the prompt.
        return job.text(f"{key}.{name}") or usual

    fields = {"instruction": part("field_instruction", "instruction"), "input": part("field_input", "input")}
    filled, bare = part("format", "{instruction} {input} "), part("no_input_format", "{instruction} ")
    with_input = filled == bare or ("{input}" in filled and job.get(f"{key}.field_input") is not None)
    prompt = filled if with_input else bare
    # At once, because a column may have the other part's name.
    prompt = re.sub(r"\{(instruction|input)\}", lambda found: f"{{{fields[found[1]]}}}", prompt)
    doubts = []
    if filled != bare:
        doubts.append(f"all rows get the layout {'with' if with_input else 'without'} an input, whatever they have")
    system = job.text(f"{key}.system_prompt")
    if system is not None and job.get(f"{key}.field_system") is None:
        prompt = part("system_format", "{system}").replace("{system}", system) + prompt
    elif job.get(f"{key}.field_system") is not None:
        doubts.append("the system text of a row is left out: write its column into the prompt of data.columns")
    job.say(key, "translated", "data.columns", LOUD + "; ".join(doubts) if doubts else "the layout as it is")
    return DataSource(
        "", "prompt-completion", {"prompt": prompt, "completion": part("field_output", "output")}, exact=True
    )


def _overlong(job: Job, *, only_text: bool) -> None:
    length = job.whole("sequence_len", least=1)
    if length is None:
        job.default("data.max_length", 512, "sequence_len is absent")
    else:
        job.put("data.max_length", length, "sequence_len")
    name = job.text("excess_length_strategy")
    actions = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    if name is not None and name.lower() not in actions:
        job.unfit("excess_length_strategy", "drop, truncate or raise")
    usual = "truncate" if only_text else "drop"
    if name is None:
        job.default(
            "data.overlong",
            usual,
            "axolotl cuts long texts into pieces" if only_text else "axolotl drops rows longer than sequence_len",
        )
    else:
        job.put("data.overlong", actions[name.lower()], "excess_length_strategy")


def _template(job: Job, key: str, count: int) -> None:
    """A data set's own template wins over the file's; a recipe has one for all rows."""
    chosen: list[str] = []
    for index in range(count):
        for name in ("chat_template", "chat_template_jinja"):
            if job.get(f"{key}.{index}.{name}") is not None:
                chosen.append(f"{key}.{index}.")
                break
    places = [*chosen, ""] if job.get("chat_template") or job.get("chat_template_jinja") else chosen
    for place in reversed(places):
        _put_template(job, place)
    if len({job.text(f"{place}chat_template") for place in places}) > 1:
        for place in places[1:]:
            job.lose(f"{place}chat_template", "there is one template for all rows, that of the first data set")


def _put_template(job: Job, place: str) -> None:
    key, source = f"{place}chat_template", f"{place}chat_template_jinja"
    name, jinja = job.text(key), job.text(source)
    if name == "jinja" or (name is None and jinja):
        if jinja and "{" not in jinja:
            job.put("data.template", jinja, source)
            job.say(key, "translated", "data.template")
        else:
            job.lose(source, "a template is named by its file: save the text to one and set data.template")
            job.say(key, "no counterpart", "data.template", "see chat_template_jinja")
    elif name in TEMPLATES:
        job.put("data.template", TEMPLATES[name], key)
    elif name and name.startswith("tokenizer_default_fallback_"):
        job.put("data.template", "auto", key, "without a template of its own the model gets `plain`")
    elif name:
        job.put(
            "data.template", "auto", key, f"the model's own template, there axolotl's copy {name!r}: compare one row"
        )
    if name != "jinja" and name is not None:
        job.say(source, "ignored", note="read only with chat_template: jinja")
