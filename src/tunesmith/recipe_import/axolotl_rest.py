"""axolotl's keys that carry nothing over: they cannot change what is learned, or there is no such thing here."""

from __future__ import annotations

from tunesmith.recipe_import.job import LOUD, Entry, Job, ignored, lost

SPEED_PLUGINS = ("liger", "cut_cross_entropy", "kernels", "cce")


def _plugins(job: Job) -> None:
    names = job.texts("plugins") or []
    if all(any(speed in name.lower() for speed in SPEED_PLUGINS) for name in names):
        job.say("plugins", "ignored", note="they change speed and memory only")
    else:
        job.say("plugins", "no counterpart", note=f"{LOUD}plugins are not run")


REST: tuple[Entry, ...] = (
    lost("DoRA is not available, plain LoRA is trained", "peft_use_dora", adapter=True),
    lost(
        "LoRA starts with B = 0, on the weights as they are, in all layers",
        *(
            "peft_init_lora_weights",
            "peft",
            "peft_layers_to_transform",
            "peft_layers_pattern",
            "peft_layer_replication",
        ),
        *("peft_trainable_token_indices", "lora_target_parameters", "lora_exclude_modules", "bnb_config_kwargs"),
        adapter=True,
    ),
    lost("A and B have the same learning rate", "loraplus_lr_ratio", adapter=True),
    lost("all weights of one run have the same learning rate", "embedding_lr", "embedding_lr_scale", "lr_groups"),
    lost("training does not start from an adapter", "lora_model_dir"),
    lost(
        "the schedule goes to zero and has no settings but its warmup",
        *("lr_scheduler_kwargs", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup"),
        *("lr_div_factor", "jagged_restart_steps", "jagged_restart_warmup_steps", "jagged_restart_anneal_steps"),
    ),
    lost(
        "the optimizer has no such setting",
        *("optim_args", "optim_target_modules", "adam_beta3", "adam_epsilon2", "dion_lr", "dion_momentum"),
    ),
    lost(
        "every weight is trained, or an adapter", "unfrozen_parameters", "lisa_n_layers", "lisa_step_interval", "relora"
    ),
    lost("the loss is the cross-entropy of the targets", "use_eaft"),
    lost(
        "rows come in an order drawn at random",
        "curriculum_sampling",
        "group_by_length",
        "shuffle_before_merging_datasets",
    ),
    lost("texts are neither joined nor cut into pieces", "pretraining_sample_concatenation", "use_pose"),
    lost("all rows are used", "dataset_shard_num", "dataset_shard_idx"),
    lost("the last rows of an epoch are used", "dataloader_drop_last", loud=False),
    lost("no row is too short", "min_sample_len"),
    lost("the tokenizer is used as it is: add tokens to it beforehand", "tokens", "added_tokens_overrides"),
    lost("a template is used without settings of its own", "chat_template_kwargs"),
    lost(
        "the model is used as its configuration has it",
        *("model_config", "overrides_of_model_config", "model_kwargs", "overrides_of_model_kwargs", "rope_scaling"),
        *("reinit_weights", "fix_untrained_tokens", "shrink_embeddings", "resize_token_embeddings_to_32x"),
        *("scaling_softmax", "model_quantization_config", "gptq", "use_onebitllms"),
    ),
    lost("arithmetic is fp32, bf16 or fp16", "fp8", "qat", "quantization"),
    lost("the data set as it was prepared there is not used", "push_dataset_to_hub", loud=False),
    lost("code that comes with a model is not run", "trust_remote_code", loud=False),
    lost("micro-batches are planned, not found by trial", "auto_find_batch_size", loud=False),
    lost("a trainer of one's own is not run", "trainer_cls"),
    Entry(("plugins",), "", "no counterpart, except those for speed", _plugins),
    lost(
        "one process is assumed: how a run is spread over devices is said when it is started",
        *("deepspeed", "deepcompile", "fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type"),
        *("ddp", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
        *("dp_shard_size", "dp_replicate_size", "context_parallel_size", "sequence_parallel_degree"),
        *("tensor_parallel_size", "use_ray", "ray_num_workers", "world_size", "device_map"),
        loud=False,
    ),
    ignored(
        "the answers' ends are found in the template",
        "eot_tokens",
    ),
    ignored(
        "the learning rate of LoRA+ is not used",
        "loraplus_lr_embedding",
    ),
    ignored("the data is read anew for every run", "dataset_prepared_path", "skip_prepare_dataset", "streaming"),
    ignored("rows are shuffled, as here", "shuffle_merged_datasets"),
    ignored("validation is done as training is", "eval_batch_size", "eval_sample_packing", "eval_sequence_len"),
    ignored(
        "the answers in the report are chosen by `evaluate`",
        "eval_table_size",
        "eval_max_new_tokens",
        "generate_samples",
        "do_causal_lm_eval",
    ),
    ignored("a run is continued with --resume", "resume_from_checkpoint", "auto_resume_from_checkpoints"),
    ignored("a run is published by hand", "hub_model_id", "hub_strategy", "hub_revision", "hf_use_auth_token"),
    ignored("weights are always safetensors", "save_safetensors", "save_only_model", "save_first_step"),
    ignored("every step is logged to events.jsonl", "logging_steps", "include_tokens_per_second", "include_tkps"),
    ignored(
        "other trackers are not written to, or name things for them",
        *("wandb_entity", "wandb_name", "wandb_run_id", "wandb_watch", "wandb_log_model", "wandb_mode"),
        *("use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "use_comet"),
        *("comet_project_name", "use_trackio", "trackio_project_name"),
    ),
    ignored(
        "it changes speed and memory only",
        *("flash_attention", "sdp_attention", "xformers_attention", "flex_attention", "eager_attention"),
        *("sage_attention", "attn_implementation", "flash_attn_cross_entropy", "flash_attn_rms_norm"),
        *("flash_attn_fuse_mlp", "flash_optimum", "tf32", "torch_compile", "torch_compile_backend"),
        *("gradient_checkpointing_kwargs", "selective_checkpointing", "activation_offloading", "layer_offloading"),
        *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "lora_on_cpu"),
        *("chunked_cross_entropy", "tiled_mlp", "low_cpu_mem_usage", "max_memory", "gpu_memory_limit", "gc_steps"),
        *("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_swiglu", "liger_glu_activation"),
        *("liger_cross_entropy", "liger_fused_linear_cross_entropy", "cut_cross_entropy"),
        *("pad_to_sequence_len", "pad_to_multiple_of", "sample_packing_group_size", "sample_packing_bin_size"),
        *("sample_packing_eff_est", "batch_flattening", "multipack_real_batches", "flash_attn_d512"),
        *("dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "dataloader_num_workers"),
        *("dataloader_pin_memory", "dataloader_prefetch_factor", "remove_unused_columns"),
        *("streaming_multipack_buffer_size", "torch_empty_cache_steps", "embeddings_skip_upcast"),
    ),
    ignored(
        "it says nothing about training",
        *("strict", "local_rank", "debug", "is_llama_derived_model", "is_mistral_derived_model"),
        *("is_qwen_derived_model", "is_falcon_derived_model", "tokenizer_type", "tokenizer_use_fast"),
        *("tokenizer_legacy", "merge_lora", "gradio_title", "profiler_steps", "loss_watchdog_threshold"),
        *("loss_watchdog_patience", "lora_fan_in_fan_out", "peft_autocast_adapter_dtype"),
    ),
    ignored("answers are drawn in this process, or by a server that is started by hand", "vllm"),
    lost(
        "TRL's own settings of preference training have no counterpart",
        *("dpo_loss_type", "dpo_loss_weights", "dpo_padding_free", "precompute_ref_log_probs", "dpo_use_liger_kernel"),
        loud=False,
    ),
)
