"""What both tools share: they hand these settings to transformers' Trainer, whose meaning is translated here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.recipe_import.job import LOUD, Entry, Job

SCHEDULES = {
    "linear": ("linear", ""),
    "cosine": ("cosine", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "cosine_with_restarts": ("cosine", "with its default of one cycle it is the plain cosine"),
    "polynomial": ("linear", "with its default power of 1 it is a line"),
    "warmup_stable_decay": ("wsd", f"{LOUD}the last fifth of the steps decays; there the number of steps is a setting"),
}

ADAMW = "adamw"
ADAMW_8BIT = "adamw-8bit"
OPTIMIZERS = {
    "adamw_torch": (ADAMW, ""),
    "adamw_torch_fused": (ADAMW, ""),
    "adamw_torch_xla": (ADAMW, ""),
    "adamw_torch_npu_fused": (ADAMW, ""),
    "adamw_apex_fused": (ADAMW, ""),
    "adamw_hf": (ADAMW, ""),
    "optimi_adamw": (ADAMW, "another implementation of the same rule"),
    "flash_adamw": (ADAMW, "another implementation of the same rule"),
    "paged_adamw": (ADAMW, "the states are not paged to the host's memory"),
    "paged_adamw_32bit": (ADAMW, "the states are not paged to the host's memory"),
    "adamw_bnb_8bit": (ADAMW_8BIT, ""),
    "adamw_8bit": (ADAMW_8BIT, ""),
    "paged_adamw_8bit": (ADAMW_8BIT, "the states are not paged to the host's memory"),
    "adamw_torch_8bit": (ADAMW_8BIT, "bitsandbytes' 8-bit states, there torchao's"),
    "ao_adamw_8bit": (ADAMW_8BIT, "bitsandbytes' 8-bit states, there torchao's"),
}

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


@dataclass(frozen=True)
class DataSource:
    """One file or data set as the recipe will name it.

    Attributes:
        exact: the columns spell the whole prompt, so that no chat template may be put around it.
    """

    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None
    exact: bool = False


def batch(job: Job, micro_key: str, accumulation_key: str, usual: int) -> None:
    """Theirs is rows of a forward pass times passes of a step, ours is rows of a step."""
    micro, passes = job.whole(micro_key, least=1), job.whole(accumulation_key, least=1)
    rows = (micro or usual) * (passes or 1)
    note = (
        f"{micro or usual} rows a pass × {passes or 1} passes = {rows} rows a step, for one process, which is assumed: "
        "with more of them multiply train.batch_size by their number"
    )
    if micro is None and passes is None:
        job.default("train.batch_size", rows, f"{micro_key} and {accumulation_key} are absent")
    elif micro is None:
        note += f"; {micro_key} is absent, which means {usual}"
    for key in (micro_key, accumulation_key):
        if job.get(key) is not None:
            job.put("train.batch_size", rows, key, note, "translated")
    if micro is not None:
        job.put("train.micro_batch", micro, micro_key)
        job.say(micro_key, "translated", "train.micro_batch, train.batch_size", note)


def schedule(job: Job, key: str, usual: str) -> None:
    name = job.text(key)
    if name is None:
        if usual != "cosine":
            job.default("train.schedule", usual, f"{key} is absent")
        return
    ours, note = SCHEDULES.get(name, (None, ""))
    if ours is None:
        job.put("train.schedule", "cosine", key)
        job.lose(key, f"there is no schedule {name!r}; cosine stands in for it", to="train.schedule")
    else:
        job.put("train.schedule", ours, key, note)


def warmup(job: Job, schedule_key: str, usual: float, why: str, *, zero_steps_count: bool) -> None:
    """A number of steps wins over a share, as it does there.

    Args:
        zero_steps_count: whether `warmup_steps: 0` wins too.
    """
    steps, ratio = job.number("warmup_steps"), job.number("warmup_ratio")
    for key, value in (("warmup_steps", steps), ("warmup_ratio", ratio)):
        if value is not None and (value < 0 or (key == "warmup_ratio" and value > 1)):
            job.unfit(key, "a share between 0 and 1" if key == "warmup_ratio" else "a number of at least 0")
    if job.text(schedule_key) == "constant":
        job.default("train.warmup", 0, "their schedule `constant` never warms up")
        for key in ("warmup_steps", "warmup_ratio"):
            job.say(key, "ignored", "train.warmup", "their schedule `constant` never warms up")
    elif steps is not None and (steps > 0 or zero_steps_count or ratio is None):
        job.put("train.warmup", steps if steps % 1 else int(steps), "warmup_steps")
        job.say("warmup_ratio", "ignored", note="warmup_steps wins over it")
    elif ratio is not None:
        # From 1 on ours is a number of steps, so a warmup over the whole run is written as just less than 1.
        job.put("train.warmup", min(ratio, 0.9999), "warmup_ratio")
        job.say("warmup_steps", "ignored", note="0 leaves it to warmup_ratio")
    else:
        job.default("train.warmup", usual, why)


def optimizer(job: Job, key: str) -> None:
    name = job.text(key)
    if name is not None and name in OPTIMIZERS:
        ours, note = OPTIMIZERS[name]
        job.put("train.optimizer", ours, key, note)
    elif name is not None:
        ours = ADAMW_8BIT if "adamw" in name and ("8bit" in name or "4bit" in name) else ADAMW
        job.put("train.optimizer", ours, key)
        job.lose(key, f"there is no optimizer {name!r}; {ours} stands in for it", to="train.optimizer")


def adam(job: Job) -> None:
    for key, usual in ADAM.items():
        value = job.number(key)
        if value is not None and value == usual:
            job.say(key, "ignored", note="the same here")
        elif value is not None:
            job.lose(key, f"AdamW has {usual} here and no key for it")


def clip(job: Job) -> None:
    value = job.number("max_grad_norm")
    if value is not None:
        job.put("train.clip", value if value > 0 else "off", "max_grad_norm", "" if value > 0 else "0 is off there")


def epochs(job: Job, key: str, usual: float) -> None:
    count = job.number(key)
    if count is not None:
        job.put("train.epochs", count, key)
    elif usual != 3 or "train.steps" in job.recipe:
        job.default("train.epochs", usual, f"{key} is absent")


def hold_back(job: Job, key: str) -> None:
    """A share of the rows, or a number of them, which a recipe cannot express."""
    size = job.number(key)
    if size is None:
        return
    if size < 0 or size == 1:
        job.unfit(key, "a share below 1, or a number of rows above 1,")
    if size == 0:
        job.say(key, "ignored", "data.validation", "0 holds nothing back, as here")
    elif size < 1:
        job.put("data.validation", size, key, "the rows that are held back are drawn otherwise than there")
    else:
        job.put("data.validation", 0.1, key)
        job.lose(
            key,
            f"a number of rows cannot be held back, a tenth is instead; set data.validation to {int(size)} divided by "
            "the number of rows",
            to="data.validation",
        )


def strategy(job: Job, key: str) -> str | None:
    """YAML reads an unquoted `no` as false."""
    return "no" if job.get(key) is False else job.text(key)


def evaluations(job: Job, *strategy_keys: str) -> None:
    validated = "data.validation" in job.recipe
    for key in strategy_keys:
        name = strategy(job, key)
        if name == "no":
            job.put("train.evaluate_every", "off", key)
        elif name is not None:
            note = "" if name == "steps" else "each epoch there; here every eval_steps, or ten times a run"
            job.say(key, "translated" if note else "taken", "train.evaluate_every", note)
    steps = job.number("eval_steps")
    if steps is None:
        return
    if not validated:
        job.say("eval_steps", "ignored", note="there are no validation rows")
    elif job.recipe.get("train.evaluate_every") == "off":
        job.say("eval_steps", "ignored", note="evaluation is off")
    else:
        _every(job, "eval_steps", "train.evaluate_every", steps)


def checkpoints(job: Job) -> None:
    name, steps = strategy(job, "save_strategy"), job.number("save_steps")
    if name == "no":
        job.put("train.checkpoint_every", "off", "save_strategy")
    elif name is not None:
        note = "" if name == "steps" else "each epoch or best there; here every save_steps, or ten times a run"
        job.say("save_strategy", "translated" if note else "taken", "train.checkpoint_every", note)
    if steps is not None and name == "no":
        job.say("save_steps", "ignored", note="checkpoints are off")
    elif steps is not None:
        _every(job, "save_steps", "train.checkpoint_every", steps)
    limit = job.number("save_total_limit")
    if limit is not None and limit >= 1:
        job.put("train.keep", job.whole("save_total_limit"), "save_total_limit", "the best one is kept besides")
    elif limit is not None:
        job.lose("save_total_limit", "every checkpoint is kept there, two here", loud=False)


def _every(job: Job, key: str, to: str, steps: float) -> None:
    total = job.recipe.get("train.steps")
    if steps <= 0:
        job.unfit(key, "a number above 0")
    if steps >= 1:
        job.put(to, job.whole(key), key)
    elif total:
        job.put(to, max(1, round(steps * total)), key, f"{steps:g} of {total} steps")
    else:
        job.say(key, "ignored", to, "a share of all steps is not known before the run: `auto` is ten times a run")


def early_stopping(job: Job, key: str) -> None:
    patience = job.whole(key, least=1)
    if patience is None:
        return
    if "data.validation" not in job.recipe:
        job.lose(key, "there are no validation rows to judge by")
    elif job.recipe.get("train.evaluate_every") == "off":
        job.lose(key, "evaluation is off")
    else:
        job.put("train.early_stopping.patience", patience, key, "evaluations in a row", "taken")


def best(job: Job, *, wanted: bool, why: str) -> None:
    """Which weights are the result matters only when there are validation rows to choose them by."""
    if "data.validation" not in job.recipe:
        return
    if not wanted:
        job.default("train.best", "last", why)
    metric = job.text("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        job.lose("metric_for_best_model", "the best checkpoint is the one with the lowest validation loss")
    else:
        job.say("metric_for_best_model", "ignored", note="the validation loss, as here")


def pretrains(job: Job) -> bool:
    """Whether raw documents are cut into blocks, so that nothing about conversations or long rows may be said."""
    return job.recipe.get("objective.kind") == "pretrain"


def noise(key: str) -> Entry:
    """NEFTune's alpha, which supervised fine-tuning has here."""

    def apply(job: Job) -> None:
        value = job.number(key)
        if value and job.recipe.get("objective.kind", "sft") != "sft":
            job.lose(key, "noise is for supervised fine-tuning")
        elif value is not None:
            job.put("objective.noise", value, key)

    return Entry((key,), "objective.noise", "as it is: NEFTune's alpha", apply)


def put_data(job: Job, sources: list[DataSource], validation: DataSource | None) -> str:
    """Writes the `data` section; the settings of the section hold for the validation file too.

    Returns:
        What is wrong with the validation rows, or an empty string.
    """
    alike = all((s.format, s.columns) == (sources[0].format, sources[0].columns) for s in sources)
    agrees = validation is None or (validation.format, validation.columns) == (sources[0].format, sources[0].columns)
    shared: DataSource | None = None
    if alike and agrees and all(source.weight is None for source in sources):
        paths = [source.path for source in sources]
        job.recipe["data.train"] = paths[0] if len(paths) == 1 else paths
        shared = sources[0]
    else:
        job.recipe["data.train"] = [_written(source) for source in sources]
        # A source without a setting of its own would take that of the section.
        if validation and all(s.format != "auto" and (s.columns or not validation.columns) for s in sources):
            shared = validation
    if shared and shared.format != "auto":
        job.recipe["data.format"] = shared.format
    if shared and shared.columns:
        job.recipe["data.columns"] = dict(shared.columns)
    if validation:
        job.recipe["data.validation"] = validation.path
        job.default("data.overlap", "keep", f"{job.tool} trains on rows that also stand in the validation file")
    if all(source.exact or source.format == "text" for source in sources) and not pretrains(job):
        job.default("data.template", "plain", "these rows go without a chat template there")
    job.default("data.duplicates", "keep", f"{job.tool} trains on every copy of a row")
    return "" if shared or not validation else "their format differs from that of the training rows: check data.format"


def _written(source: DataSource) -> dict[str, Any]:
    given = {"path": source.path, "weight": source.weight, "format": source.format, "columns": source.columns}
    return {key: value for key, value in given.items() if value not in (None, "auto", {})}


def closing(job: Job) -> None:
    """What holds for every file of both tools."""
    if job.get("seed") is None:
        job.default("seed", 42, "seed is absent; the random streams differ all the same")
    job.defaults.append(
        f"data.test: auto (a tenth of the rows, 20 to 200, is held back for the verdict, and {job.tool} would train on "
        "them; `evaluate: off` trains on every row)"
    )
