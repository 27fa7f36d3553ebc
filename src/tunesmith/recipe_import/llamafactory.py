"""LLaMA-Factory's keys, as its arguments of version 0.9.5 define them, and what they become."""

from __future__ import annotations

from tunesmith.recipe_import import trainer_settings
from tunesmith.recipe_import.job import LOUD, Entry, Job, same
from tunesmith.recipe_import.llamafactory_data import data, length, template
from tunesmith.recipe_import.llamafactory_rest import REST
from tunesmith.recipe_import.llamafactory_stages import STAGE

TOOL = "LLaMA-Factory"
TRACKERS = ("tensorboard", "wandb")


def _method(job: Job) -> None:
    name = job.text("finetuning_type") or "lora"
    if name not in ("lora", "full"):
        job.refuse("finetuning_type", f"the method {name!r} is not available", "lora and full are")
    job.recipe["method.kind"] = name
    job.say("finetuning_type", "taken", "method.kind")
    lora = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora")
    if name == "full":
        for key in lora:
            if job.get(key) is not None:
                job.say(key, "ignored", note="there is no adapter")
        return
    rank, alpha = job.whole("lora_rank", least=1), job.number("lora_alpha")
    if rank is None:
        job.default("method.rank", 8, "lora_rank is absent")
    else:
        job.put("method.rank", rank, "lora_rank")
    if alpha:
        job.put("method.alpha", alpha, "lora_alpha")
    else:
        job.default("method.alpha", 2 * (rank or 8), "lora_alpha is absent: twice the rank")
        job.say("lora_alpha", "translated", "method.alpha", "0 means twice the rank")
    if (dropout := job.number("lora_dropout")) is not None:
        job.put("method.dropout", dropout, "lora_dropout")
    if (flag := job.flag("use_rslora")) is not None:
        job.put("method.rslora", flag, "use_rslora")
    if (targets := job.texts("lora_target")) is not None:
        job.put("method.targets", "all-linear" if targets == ["all"] else targets, "lora_target")
    if (whole := job.texts("additional_target")) is not None:
        job.put("method.modules_to_save", whole, "additional_target")


def _quantization(job: Job) -> None:
    bits = job.whole("quantization_bit", least=1)
    details = {
        "quantization_method": ("bnb", "bitsandbytes"),
        "quantization_type": ("nf4", "fp4"),
        "double_quantization": ("true", "false"),
    }
    if bits is None:
        for key in details:
            if job.get(key) is not None:
                job.say(key, "ignored", note="nothing is quantized")
        return
    if job.recipe["method.kind"] == "full":
        job.refuse(
            "quantization_bit",
            "quantized weights cannot be trained whole, and LLaMA-Factory refuses this file too",
            "set finetuning_type: lora",
        )
    job.put("model.quantize", "nf4" if bits <= 4 else "int8", "quantization_bit")
    if bits not in (4, 8):
        job.lose("quantization_bit", f"weights have 4 or 8 bits, and not {bits}", to="model.quantize")
    for key, fitting in details.items():
        value = job.get(key)
        if value is not None and (str(value).lower() in fitting or (bits == 8 and key != "quantization_method")):
            job.say(key, "ignored", note="so it is here")
        elif value is not None:
            job.lose(key, "4 bits are bitsandbytes' NF4 or FP4, 8 bits its int8")
    if bits <= 4 and str(job.get("quantization_type")).lower() == "fp4":
        job.put("model.quantize", "fp4", "quantization_type")
    if bits <= 4 and job.get("double_quantization") is False:
        job.put("model.double_quantization", False, "double_quantization")


def _targets_of_loss(job: Job) -> None:
    everything, last = job.flag("train_on_prompt"), job.flag("mask_history")
    if everything and last:
        job.refuse("mask_history", "train_on_prompt and mask_history exclude each other", "remove one of them")
    if trainer_settings.pretrains(job):
        for key in ("train_on_prompt", "mask_history"):
            job.say(key, "ignored", note="every token of raw text is trained on")
        return
    chosen = "everything" if everything else "last-answer" if last else "answers"
    for key in ("train_on_prompt", "mask_history"):
        if job.get(key) is not None:
            job.put("data.train_on", chosen, key)


def _length(job: Job) -> None:
    limit = job.number("max_steps")
    if limit is not None and limit > 0:
        job.put("train.steps", job.whole("max_steps"), "max_steps", "it wins over num_train_epochs")
        job.say("num_train_epochs", "ignored", note="max_steps wins over it")
        return
    job.say("max_steps", "ignored", note="no limit")
    trainer_settings.epochs(job, "num_train_epochs", usual=3.0)


def _rate(job: Job) -> None:
    value = job.number("learning_rate")
    if value is None:
        job.default("train.learning_rate", 5e-5, "learning_rate is absent")
    else:
        job.put("train.learning_rate", value, "learning_rate")
    trainer_settings.schedule(job, "lr_scheduler_type", "linear")
    trainer_settings.warmup(
        job, "lr_scheduler_type", 0, "warmup_steps and warmup_ratio are absent: no warmup", zero_steps_count=False
    )


def _packing(job: Job) -> None:
    packed, neat = job.flag("packing"), job.flag("neat_packing")
    if trainer_settings.pretrains(job):
        mixed = "" if neat else f"{LOUD}documents in one block see each other there, and never here"
        for key in ("packing", "neat_packing"):
            job.say(key, "translated", "objective.kind", mixed)
        if packed is None and not neat:
            job.defaults.append(f"objective.kind: pretrain (stage pt packs; {mixed})")
        return
    on = bool(packed)
    note = (
        f"{LOUD}their batch counts packed sequences of cutoff_len tokens, ours counts rows: multiply train.batch_size "
        "by the rows that fit into one sequence on average"
    )
    mixed = "; rows in one sequence see each other there, and never here"
    if neat or on:
        job.recipe["train.packing"] = True
        job.say("neat_packing", "taken", "train.packing", note)
        job.say("packing", "taken", "train.packing", note + ("" if neat else mixed))
    else:
        for key in ("packing", "neat_packing"):
            if job.get(key) is not None:
                job.put("train.packing", False, key)


def _precision(job: Job) -> None:
    bf16, fp16, pure = job.flag("bf16"), job.flag("fp16"), job.flag("pure_bf16")
    if bf16 and fp16:
        job.refuse("fp16", "bf16 and fp16 exclude each other", "keep one of them")
    if bf16 or pure:
        job.put("train.dtype", "bf16", "bf16" if bf16 else "pure_bf16")
    elif fp16:
        job.put("train.dtype", "fp16", "fp16")
    else:
        job.defaults.append(
            "train.dtype: auto (neither bf16 nor fp16 is on: LLaMA-Factory then follows the dtype of the checkpoint)"
        )
    if pure:
        job.lose("pure_bf16", "trained weights are fp32 here, and bf16 there", to="train.dtype")
    for key in ("bf16", "fp16", "pure_bf16"):
        if job.get(key) is not None and key not in job.said:
            job.say(key, "translated", "train.dtype", "off")


def _checkpointing(job: Job) -> None:
    if (off := job.flag("disable_gradient_checkpointing")) is not None:
        job.put("train.gradient_checkpointing", not off, "disable_gradient_checkpointing")
    if (on := job.flag("gradient_checkpointing")) is not None:
        job.put("train.gradient_checkpointing", on, "gradient_checkpointing")


def _evaluation(job: Job) -> None:
    trainer_settings.hold_back(job, "val_size")
    trainer_settings.evaluations(job, "eval_strategy", "evaluation_strategy")
    trainer_settings.checkpoints(job)
    trainer_settings.early_stopping(job, "early_stopping_steps")
    wanted = job.flag("load_best_model_at_end")
    job.say("load_best_model_at_end", "translated", "train.best")
    trainer_settings.best(
        job, wanted=bool(wanted), why="the last weights are the result unless load_best_model_at_end is on"
    )


def _logs(job: Job) -> None:
    names = job.texts("report_to")
    if names is None:
        return
    known = [name for name in TRACKERS if name in names or names == ["all"]]
    others = [name for name in names if name not in (*TRACKERS, "none", "all")]
    note = f"there is no tracker {', '.join(others)}" if others else ""
    job.put("train.log", known, "report_to", note)


TABLE: tuple[Entry, ...] = (
    STAGE,
    same("model_name_or_path", "model.path", Job.text),
    same("model_revision", "model.revision", Job.text),
    Entry(
        ("finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target")
        + ("use_rslora",),
        "method.kind, method.*",
        "lora or full; rank 8 and alpha twice the rank when absent; the target `all` is all-linear",
        _method,
    ),
    Entry(
        ("quantization_bit", "quantization_method", "quantization_type", "double_quantization"),
        "model.quantize, model.double_quantization",
        "4 is nf4 or fp4, 8 is int8",
        _quantization,
    ),
    Entry(
        ("dataset", "dataset_dir", "eval_dataset", "mix_strategy", "interleave_probs"),
        "data.train, data.format, data.columns, data.validation",
        "names are looked up in dataset_info.json, whose columns and tags become format and columns",
        data,
    ),
    Entry(("template", "default_system"), "data.template, data.system", "auto unless it is a named template", template),
    Entry(("cutoff_len",), "data.max_length, data.overlong", "longer rows are cut; 2048 when absent", length),
    Entry(
        ("train_on_prompt", "mask_history"),
        "data.train_on",
        "everything; last-answer; else answers",
        _targets_of_loss,
    ),
    Entry(("max_steps", "num_train_epochs"), "train.steps, train.epochs", "3 epochs when absent", _length),
    Entry(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        "train.batch_size, train.micro_batch",
        "rows × accumulation = rows of a step, for one process; 8 and 1 when absent",
        lambda job: trainer_settings.batch(job, "per_device_train_batch_size", "gradient_accumulation_steps", usual=8),
    ),
    Entry(("packing", "neat_packing"), "train.packing", "as it is, but their batch counts packed sequences", _packing),
    Entry(
        ("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio"),
        "train.learning_rate, train.schedule, train.warmup",
        "5e-5, a line and no warmup when absent",
        _rate,
    ),
    same("weight_decay", "train.weight_decay", Job.number),
    trainer_settings.noise("neftune_noise_alpha"),
    Entry(("max_grad_norm",), "train.clip", "0 is off; 1 when absent", trainer_settings.clip),
    Entry(
        ("optim",),
        "train.optimizer",
        "AdamW of any make, with 8-bit states or without",
        lambda job: trainer_settings.optimizer(job, "optim"),
    ),
    Entry(tuple(trainer_settings.ADAM), "", "no counterpart unless it is AdamW's usual value", trainer_settings.adam),
    Entry(("bf16", "fp16", "pure_bf16"), "train.dtype", "as it is; auto when absent", _precision),
    Entry(
        ("disable_gradient_checkpointing", "gradient_checkpointing"),
        "train.gradient_checkpointing",
        "as it is",
        _checkpointing,
    ),
    Entry(
        ("val_size", "eval_steps", "eval_strategy", "evaluation_strategy", "save_steps", "save_strategy")
        + ("save_total_limit", "early_stopping_steps", "load_best_model_at_end", "metric_for_best_model"),
        "data.validation, train.evaluate_every, train.checkpoint_every, train.keep, train.early_stopping, train.best",
        "a share held back, steps as they are, the last weights unless the best are asked for",
        _evaluation,
    ),
    Entry(("report_to",), "train.log", "tensorboard, wandb", _logs),
    same("output_dir", "output", Job.text, "as it is; an existing run is never overwritten"),
    same("seed", "seed", Job.whole, "as it is; 42 when absent"),
    *REST,
)
