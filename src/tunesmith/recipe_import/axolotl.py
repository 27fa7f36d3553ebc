"""axolotl's keys, as its schemas of version 0.19 define them, and what they become."""

from __future__ import annotations

from typing import Any

from tunesmith.recipe_import import trainer_settings
from tunesmith.recipe_import.axolotl_data import data
from tunesmith.recipe_import.axolotl_rest import REST
from tunesmith.recipe_import.axolotl_stages import STAGE
from tunesmith.recipe_import.job import LOUD, Entry, Job, same

TOOL = "axolotl"
LORA = {"lora_r": "method.rank", "lora_alpha": "method.alpha"}


def _adapter(job: Job) -> None:
    name = job.text("adapter")
    four, eight = job.flag("load_in_4bit"), job.flag("load_in_8bit")
    if name not in (None, "lora", "qlora"):
        job.refuse("adapter", f"the adapter {name!r} is not available", "lora, qlora and full fine-tuning are")
    if four and eight:
        job.refuse("load_in_8bit", "load_in_4bit and load_in_8bit exclude each other", "keep one of them")
    if eight and name == "qlora":
        job.refuse("load_in_8bit", "qlora is 4-bit, and axolotl refuses this file too", "use adapter: lora")
    if (four or eight) and name is None:
        job.refuse(
            "load_in_4bit" if four else "load_in_8bit",
            "quantized weights cannot be trained whole, and axolotl refuses this file too",
            "set adapter: qlora or lora",
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        job.say(key, "ignored", "model.quantize", "off, as here")
    if name is None:
        job.recipe["method.kind"] = "full"
        note = f"{LOUD}trained weights are fp32 here, and there as they are loaded, which is bf16 as a rule"
        job.say("adapter", "translated", "method.kind", note)
        if "adapter" not in job.found:
            job.defaults.append(f"method.kind: full (adapter is absent; {note})")
        return
    if eight:
        job.put("model.quantize", "int8", "load_in_8bit")
    elif four or name == "qlora":
        job.put("model.quantize", "nf4", "load_in_4bit" if four else "adapter")
    job.put("method.kind", "lora", "adapter", "" if name == "lora" or four else "with model.quantize: nf4")


def _lora(job: Job) -> None:
    targets = ("lora_target_linear", "lora_target_modules")
    others = ("lora_dropout", "lora_modules_to_save", "lora_rank_pattern", "lora_alpha_pattern", "peft_use_rslora")
    if job.recipe["method.kind"] == "full":
        for key in (*LORA, *targets, *others):
            if job.get(key) is not None:
                job.say(key, "ignored", note="there is no adapter")
        return
    for key, to in LORA.items():
        value = job.number(key)
        if value is not None:
            job.put(to, job.whole(key) if key == "lora_r" else value, key)
        else:
            job.defaults.append(f"{to}: Tunesmith's own (axolotl has no default for {key} and fails without it)")
    if (dropout := job.number("lora_dropout")) is not None:
        job.put("method.dropout", dropout, "lora_dropout")
    if (whole := job.texts("lora_modules_to_save")) is not None:
        job.put("method.modules_to_save", whole, "lora_modules_to_save")
    if (flag := job.flag("peft_use_rslora")) is not None:
        job.put("method.rslora", flag, "peft_use_rslora")
    for key, to in (("lora_rank_pattern", "method.rank_pattern"), ("lora_alpha_pattern", "method.alpha_pattern")):
        if job.get(key) is not None:
            job.put(to, job.get(key), key)
    _targets(job)


def _targets(job: Job) -> None:
    linear, modules = job.flag("lora_target_linear"), job.get("lora_target_modules")
    if linear:
        job.put("method.targets", "all-linear", "lora_target_linear")
        extra = {"embed_tokens", "lm_head", "wte"} & set(job.texts("lora_target_modules") or ())
        if extra:
            job.lose("lora_target_modules", f"all-linear leaves out {', '.join(sorted(extra))}")
        else:
            job.say("lora_target_modules", "ignored", note="lora_target_linear has them already")
        return
    job.say("lora_target_linear", "ignored", note="off")
    if isinstance(modules, str):
        job.put("method.targets", modules, "lora_target_modules", "one regular expression")
    elif modules is not None:
        job.put("method.targets", job.texts("lora_target_modules"), "lora_target_modules")
    else:
        job.defaults.append("method.targets: all-linear (axolotl has no default for lora_target_modules)")


def _precision(job: Job) -> None:
    """bf16 wins over fp16; `auto` is bf16 where the device has it."""
    given = job.get("bf16")
    bf16 = str("auto" if given is None else given).lower()
    if bf16 not in ("auto", "full", "true", "false"):
        job.unfit("bf16", "true, false, auto or full")
    pure_bf16, fp16, pure_fp16 = job.flag("bfloat16"), job.flag("fp16"), job.flag("float16")
    note = ""
    if bf16 in ("true", "full"):
        dtype, key = "bf16", "bf16"
    elif pure_bf16:
        dtype, key, note = "bf16", "bfloat16", f"{LOUD}trained weights are fp32 here, and bf16 there"
    elif fp16:
        dtype, key = "fp16", "fp16"
    elif bf16 == "auto":
        dtype, key, note = "auto", "bf16", "where the device has no bf16 it is fp32 here and fp16 there"
    elif pure_fp16:
        dtype, key, note = "fp16", "float16", f"{LOUD}trained weights are fp32 here, and fp16 there"
    else:
        dtype, key = "fp32", "bf16"
    job.put("train.dtype", dtype, key, note)
    for other in ("bf16", "bfloat16", "fp16", "float16", "float32"):
        if other != key and job.get(other) is not None:
            job.say(other, "translated", "train.dtype", f"together they are {dtype}")


def _batch(job: Job) -> None:
    total = job.whole("batch_size", least=1)
    trainer_settings.batch(job, "micro_batch_size", "gradient_accumulation_steps", usual=1)
    if total is None:
        return
    if job.get("gradient_accumulation_steps") is not None:
        job.refuse("batch_size", "batch_size and gradient_accumulation_steps exclude each other", "remove one of them")
    micro = job.recipe.get("train.micro_batch")
    if micro and total % micro:
        job.unfit("batch_size", f"a multiple of micro_batch_size ({micro})")
    job.put("train.batch_size", total, "batch_size", "rows of a step, as documented, for one process")


def _packing(job: Job) -> None:
    """One of their packed sequences counts as one row of the batch."""
    packed = job.flag("sample_packing")
    if packed:
        job.put(
            "train.packing",
            True,
            "sample_packing",
            f"{LOUD}their batch counts packed sequences of sequence_len tokens, ours counts rows: multiply "
            "train.batch_size by the rows that fit into one sequence on average",
        )
    elif packed is False:
        job.put("train.packing", False, "sample_packing")


def _evaluation(job: Job) -> None:
    trainer_settings.hold_back(job, "val_set_size")
    trainer_settings.evaluations(job, "eval_strategy", "evaluation_strategy")
    for key, to in (("evals_per_epoch", "train.evaluate_every"), ("saves_per_epoch", "train.checkpoint_every")):
        if job.get(key) is not None:
            job.say(key, "ignored", to, "steps of an epoch are not known before the run: `auto` is ten times a run")
    trainer_settings.checkpoints(job)
    trainer_settings.early_stopping(job, "early_stopping_patience")
    asked = job.flag("load_best_model_at_end")
    job.say("load_best_model_at_end", "translated", "train.best")
    wanted = (asked or job.get("early_stopping_patience") is not None) and _checkpoints_are_evaluated(job)
    why = "axolotl keeps the last weights unless asked for the best with save_steps a multiple of eval_steps"
    trainer_settings.best(job, wanted=wanted, why=why)


def _checkpoints_are_evaluated(job: Job) -> bool:
    saves, evaluations = job.number("save_steps"), job.number("eval_steps")
    if saves and evaluations:
        return saves % evaluations == 0
    per_epoch = job.number("saves_per_epoch"), job.number("evals_per_epoch")
    return bool(per_epoch[0] and per_epoch[1] and per_epoch[1] % per_epoch[0] == 0)


def _length(job: Job) -> None:
    limit = job.number("max_steps")
    if limit is not None and limit > 0:
        job.put("train.steps", job.whole("max_steps"), "max_steps")
    else:
        job.say("max_steps", "ignored", note="no limit")
    trainer_settings.epochs(job, "num_epochs", usual=1.0)


def _rate(job: Job) -> None:
    value = job.number("learning_rate")
    if value is None:
        job.defaults.append("train.learning_rate: auto (axolotl requires learning_rate and would refuse this file)")
    else:
        job.put("train.learning_rate", value, "learning_rate")
    trainer_settings.schedule(job, "lr_scheduler", "cosine")
    why = "3% of the steps; axolotl stops at 100 steps, so for more than 3333 steps set train.warmup: 100"
    trainer_settings.warmup(job, "lr_scheduler", 0.03, why, zero_steps_count=True)


def _checkpointing(job: Job) -> None:
    value: Any = job.get("gradient_checkpointing")
    if isinstance(value, str) and value.startswith("offload"):
        job.put("train.gradient_checkpointing", True, "gradient_checkpointing", "nothing is moved to the host's memory")
    elif value is not None:
        job.put("train.gradient_checkpointing", job.flag("gradient_checkpointing"), "gradient_checkpointing")


def _targets_of_loss(job: Job) -> None:
    value = job.flag("train_on_inputs")
    if value is not None:
        job.put("data.train_on", "everything" if value else "answers", "train_on_inputs")


def _special_tokens(job: Job) -> None:
    given = job.get("special_tokens")
    if not isinstance(given, dict):
        return
    job.opened["special_tokens"] = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
    for name in given:
        key = f"special_tokens.{name}"
        if name == "pad_token" and job.get(key) is not None:
            job.say(key, "ignored", note="padding is never attended to nor trained on")
        elif job.get(key) is not None:
            job.lose(key, "the tokenizer is used as it is: add tokens to it beforehand")
    job.say("special_tokens", "translated", note="see the tokens")


def _logs(job: Job) -> None:
    to = []
    if job.flag("use_tensorboard"):
        to.append("tensorboard")
    if job.flag("use_wandb") or job.get("wandb_project") is not None:
        to.append("wandb")
    key = next((key for key in ("wandb_project", "use_wandb", "use_tensorboard") if job.get(key)), None)
    if to and key:
        job.put("train.log", to, key)
    for name in ("use_wandb", "use_tensorboard", "wandb_project"):
        if job.get(name) is not None and name != key:
            job.say(name, "translated", "train.log")
    if job.get("wandb_project") is not None:
        job.say("wandb_project", "translated", "train.log", "the project's name is not taken over")


def _duplicates(job: Job) -> None:
    if job.flag("dataset_exact_deduplication"):
        job.put("data.duplicates", "drop", "dataset_exact_deduplication")
    else:
        job.say("dataset_exact_deduplication", "ignored", "data.duplicates", "off: data.duplicates: keep")


def _tokenizer(job: Job) -> None:
    model = job.text("base_model")
    for key in ("tokenizer_config", "base_model_config"):
        if job.text(key) == model:
            job.say(key, "ignored", note="the model's own, as here")
        elif job.get(key) is not None:
            job.lose(key, "the model's own configuration and tokenizer are used")
    for key in ("model_type", "type_of_model"):
        name = job.text(key)
        if name is not None and ("CausalLM" in name or name.startswith("Auto")):
            job.say(key, "ignored", note="every causal language model is loaded by its own configuration")
        elif name is not None:
            job.lose(key, "the model's own configuration says what it is")


TABLE: tuple[Entry, ...] = (
    STAGE,
    same("base_model", "model.path", Job.text),
    same("revision_of_model", "model.revision", Job.text),
    same("model_revision", "model.revision", Job.text),
    Entry(
        ("adapter", "load_in_4bit", "load_in_8bit"),
        "method.kind, model.quantize",
        "lora; qlora is lora with nf4; empty is full; 8-bit is int8",
        _adapter,
    ),
    Entry(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_modules_to_save")
        + ("peft_use_rslora", "lora_rank_pattern", "lora_alpha_pattern"),
        "method.*",
        "rank, alpha, dropout, targets (linear: all-linear), modules_to_save, rslora, rank_pattern, alpha_pattern",
        _lora,
    ),
    Entry(
        ("datasets", "pretraining_dataset", "test_datasets", "sequence_len", "excess_length_strategy", "chat_template")
        + ("chat_template_jinja",),
        "data.train, data.format, data.columns, data.validation, data.max_length, data.overlong, data.template",
        "types become format and columns; longer rows are dropped unless the file says otherwise; the length is 512 "
        "without sequence_len",
        data,
    ),
    Entry(("dataset_exact_deduplication",), "data.duplicates", "keep unless true", _duplicates),
    same("default_system_message", "data.system", Job.text),
    Entry(("train_on_inputs",), "data.train_on", "false: answers; true: everything", _targets_of_loss),
    Entry(("max_steps", "num_epochs"), "train.steps, train.epochs", "1 epoch when absent", _length),
    Entry(
        ("micro_batch_size", "gradient_accumulation_steps", "batch_size"),
        "train.batch_size, train.micro_batch",
        "micro-batch × accumulation = rows of a step, for one process; both 1 when absent",
        _batch,
    ),
    Entry(("sample_packing",), "train.packing", "as it is, but their batch counts packed sequences", _packing),
    Entry(
        ("learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio"),
        "train.learning_rate, train.schedule, train.warmup",
        "cosine and 3% warmup when absent",
        _rate,
    ),
    same("weight_decay", "train.weight_decay", Job.number),
    trainer_settings.noise("neftune_noise_alpha"),
    trainer_settings.noise("noisy_embedding_alpha"),
    Entry(("max_grad_norm",), "train.clip", "0 is off; 1 when absent", trainer_settings.clip),
    Entry(
        ("optimizer",),
        "train.optimizer",
        "AdamW of any make, with 8-bit states or without",
        lambda job: trainer_settings.optimizer(job, "optimizer"),
    ),
    Entry(tuple(trainer_settings.ADAM), "", "no counterpart unless it is AdamW's usual value", trainer_settings.adam),
    Entry(("bf16", "fp16", "bfloat16", "float16", "float32"), "train.dtype", "bf16 wins; auto when absent", _precision),
    Entry(("gradient_checkpointing",), "train.gradient_checkpointing", "as it is", _checkpointing),
    Entry(
        ("val_set_size", "eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy", "save_steps")
        + ("saves_per_epoch", "save_strategy", "save_total_limit", "early_stopping_patience", "load_best_model_at_end")
        + ("metric_for_best_model",),
        "data.validation, train.evaluate_every, train.checkpoint_every, train.keep, train.early_stopping, train.best",
        "a share held back, steps as they are, the last weights unless the best are asked for",
        _evaluation,
    ),
    Entry(("use_wandb", "wandb_project", "use_tensorboard"), "train.log", "wandb, tensorboard", _logs),
    same("output_dir", "output", Job.text, "as it is; an existing run is never overwritten"),
    same("seed", "seed", Job.whole, "as it is; 42 when absent"),
    Entry(("special_tokens",), "", "no counterpart, except that pad_token does not matter", _special_tokens),
    Entry(("base_model_config", "tokenizer_config", "model_type", "type_of_model"), "", "the model's own", _tokenizer),
    *REST,
)
