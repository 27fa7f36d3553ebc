"""LLaMA-Factory's keys that carry nothing over: they cannot change what is learned, or there is no such thing here."""

from __future__ import annotations

from tunesmith.recipe_import.job import Entry, Job, ignored, lost


def _thinking(job: Job) -> None:
    """Theirs is on by default, so `lost` would take what changes the prompt for what is off."""
    if job.flag("enable_thinking") is False:
        job.lose("enable_thinking", "the template decides about thinking")
    else:
        job.say("enable_thinking", "ignored", note="the template decides about thinking")


REST: tuple[Entry, ...] = (
    lost("DoRA is not available, plain LoRA is trained", "use_dora", adapter=True),
    lost("LoRA starts with B = 0, on the weights as they are", "pissa_init", "pissa_convert", adapter=True),
    lost("A and B have the same learning rate", "loraplus_lr_ratio", adapter=True),
    lost("training does not start from an adapter", "adapter_name_or_path", "create_new_adapter", "adapter_folder"),
    lost("all rows are used: cut the file beforehand", "max_samples"),
    lost("the rows are read from the data set, and not from what was prepared there", "tokenized_path"),
    lost("rows come in an order drawn at random", "disable_shuffling", "group_by_length", "train_sampling_strategy"),
    lost("the schedule goes to zero and has no settings but its warmup", "lr_scheduler_kwargs"),
    lost("the optimizer has no such setting", "optim_args", "optim_target_modules"),
    lost(
        "the optimizer is AdamW",
        *("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"),
    ),
    lost("the loss is the cross-entropy of the targets", "use_dft_loss", "use_asft_loss", "use_eaft_loss"),
    lost("targets are not smoothed", "label_smoothing_factor"),
    lost("the tokenizer is used as it is: add tokens to it beforehand", "add_tokens", "add_special_tokens"),
    lost("the tokenizer is used as it is", "resize_vocab", "new_special_tokens_config", "split_special_tokens"),
    lost(
        "the model is used as its configuration has it",
        *("rope_scaling", "shift_attn", "mixture_of_depths", "moe_aux_loss_coef", "train_from_scratch"),
        *("use_llama_pro", "upcast_layernorm", "upcast_lmhead_output"),
    ),
    lost("the whole model is trained, or an adapter", "freeze_language_model"),
    lost("arithmetic is fp32, bf16 or fp16", "fp8"),
    lost("tools and reasoning are written as the template has them", "tool_format", "preserve_thinking"),
    lost("the last rows of an epoch are used", "dataloader_drop_last", loud=False),
    lost("code that comes with a model is not run", "trust_remote_code", loud=False),
    lost("micro-batches are planned, not found by trial", "auto_find_batch_size", loud=False),
    lost(
        "one process is assumed: how a run is spread over devices is said when it is started",
        *("deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
        *("ray_num_workers", "ray_init_kwargs", "master_addr", "master_port", "use_mca", "use_hyper_parallel"),
        *("hyper_parallel_args", "use_kt", "ray_run_name", "ray_storage_path", "resources_per_worker"),
        loud=False,
    ),
    ignored("an existing run is never overwritten", "overwrite_output_dir"),
    ignored("the loss curve is always in the report", "plot_loss"),
    ignored("every step is logged to events.jsonl", "logging_steps", "logging_strategy", "logging_first_step"),
    ignored("the data is read anew for every run", "overwrite_cache", "cache_dir", "streaming", "buffer_size"),
    ignored("a run is continued with --resume", "resume_from_checkpoint", "ignore_data_skip"),
    ignored("validation is done as training is", "per_device_eval_batch_size", "eval_accumulation_steps", "do_eval"),
    ignored("validation is one set of rows", "eval_on_each_dataset", "eval_delay", "eval_on_start"),
    ignored(
        "answers are generated and scored by `evaluate`",
        *("predict_with_generate", "compute_accuracy", "do_predict", "max_length"),
        *("do_sample", "num_beams", "eval_num_beams", "repetition_penalty", "length_penalty"),
        *("generation_max_length", "generation_num_beams", "skip_special_tokens"),
    ),
    Entry(("enable_thinking",), "", "no counterpart when false: the template decides about thinking", _thinking),
    ignored("padding is never trained on", "ignore_pad_token_for_loss"),
    ignored("weights are always safetensors", "save_safetensors", "save_only_model"),
    ignored("a run is published by hand", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
    ignored(
        "it changes speed and memory only",
        *("flash_attn", "enable_liger_kernel", "use_liger_kernel", "use_unsloth", "use_unsloth_gc", "tf32"),
        *("use_reentrant_gc", "gradient_checkpointing_kwargs", "low_cpu_mem_usage", "torch_compile"),
        *("preprocessing_num_workers", "preprocessing_batch_size", "dataloader_num_workers", "use_v1_kernels"),
        *("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
        *("remove_unused_columns", "data_shared_file_system", "use_fast_tokenizer", "torch_empty_cache_steps"),
        *("quantization_device_map", "offload_folder", "include_effective_tokens_per_second"),
    ),
    ignored(
        "a setting of something that is said in another key",
        *("pissa_iter", "loraplus_lr_embedding", "galore_rank", "galore_target", "galore_scale", "apollo_rank"),
        *("badam_mode", "asft_alpha", "eaft_alpha", "init_special_tokens", "fp8_backend"),
    ),
    ignored(
        "other stages and methods only",
        *("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "oft_rank"),
    ),
    ignored(
        "images, videos and sound are not read",
        *("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen"),
        *("media_dir", "freeze_vision_tower", "freeze_multi_modal_projector"),
    ),
    ignored(
        "serving and exporting are commands of their own",
        *("infer_backend", "infer_dtype", "use_kv_cache", "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager"),
        *("export_dir", "export_size", "export_device", "export_legacy_format", "export_hub_model_id"),
    ),
    ignored(
        "other trackers are not written to, or named for them",
        *("run_name", "project", "use_swanlab", "swanlab_project", "swanlab_run_name", "swanlab_mode", "logging_dir"),
    ),
    ignored("it says nothing about training", "hf_hub_token", "ms_hub_token", "print_param_status", "log_level"),
)
