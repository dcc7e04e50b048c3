"""Keys of TRL, axolotl and torchtitan configs, and their counterparts in a fastpref config."""

from __future__ import annotations

from typing import NamedTuple


class Counterpart(NamedTuple):
    """Place of another trainer's setting in a fastpref config."""

    path: str  # empty where fastpref has no such key
    advice: str = ""


OPTIMIZERS = "adamw, rmsprop, sgd, adamw_8bit or paged_adamw_8bit"

BY_TRAINER: dict[str, dict[str, Counterpart]] = {
    "TRL and axolotl": {
        # Model
        "bf16": Counterpart("model.dtype", "bfloat16 is the default"),
        "fp16": Counterpart("model.dtype", "bfloat16 or float32; float16 is not supported"),
        "tf32": Counterpart("", "torch's own setting applies"),
        "trust_remote_code": Counterpart("model.trust_remote_code"),
        # Adapter
        "load_in_4bit": Counterpart("adapter.quantize", "nf4"),
        "load_in_8bit": Counterpart("", "adapter.quantize: nf4 is the only quantization"),
        "lora_r": Counterpart("adapter.r"),
        "lora_alpha": Counterpart("adapter.alpha"),
        "lora_dropout": Counterpart("adapter.dropout"),
        "lora_target_modules": Counterpart("adapter.target_modules"),
        "lora_target_parameters": Counterpart("adapter.target_parameters"),
        "lora_modules_to_save": Counterpart("", "an adapter trains low-rank matrices only"),
        # Objective and reference
        "rpo_alpha": Counterpart(
            "loss", "a list: [{name: dpo, weight: 1}, {name: sft, weight: 1}]"
        ),
        "precompute_ref_log_probs": Counterpart("reference", "cached"),
        "desirable_weight": Counterpart("loss.desirable_weight"),
        "undesirable_weight": Counterpart("loss.undesirable_weight"),
        # Optimizer
        "learning_rate": Counterpart("optim.lr"),
        "warmup_steps": Counterpart("optim.warmup_steps"),
        "warmup_ratio": Counterpart("optim.warmup_ratio"),
        "weight_decay": Counterpart("optim.weight_decay"),
        "adam_beta1": Counterpart("optim.betas", "a list of both"),
        "adam_beta2": Counterpart("optim.betas", "a list of both"),
        "adam_epsilon": Counterpart("optim.eps"),
        "max_grad_norm": Counterpart("optim.max_grad_norm"),
        # Training
        "max_steps": Counterpart("training.steps"),
        "gradient_accumulation_steps": Counterpart(
            "",
            "training.batch_size is the whole step, and training.micro_batch_tokens bounds a "
            "micro-batch",
        ),
        "gradient_checkpointing": Counterpart(
            "training.activation_checkpointing", "auto, full, selective, off or a number of blocks"
        ),
        "gradient_checkpointing_kwargs": Counterpart(
            "training.activation_checkpointing", "auto, full, selective, off or a number of blocks"
        ),
        "activation_offloading": Counterpart(
            "", "training.activation_checkpointing: full saves the memory of activations"
        ),
        "torch_compile": Counterpart("training.compile"),
        "seed": Counterpart("training.seed"),
        "output_dir": Counterpart("training.output_dir"),
        "logging_steps": Counterpart("training.log_every", "in steps"),
        "eval_steps": Counterpart("training.eval_every", "in steps"),
        "eval_strategy": Counterpart("training.eval_every", "in steps"),
        "evaluation_strategy": Counterpart("training.eval_every", "in steps"),
        "save_steps": Counterpart("training.checkpoint_every", "in steps"),
        "save_strategy": Counterpart("training.checkpoint_every", "in steps"),
        "save_total_limit": Counterpart("training.keep_checkpoints"),
        "resume_from_checkpoint": Counterpart("resume", "auto, or the folder of a checkpoint"),
        "hub_model_id": Counterpart("training.hub_model_id"),
        "load_best_model_at_end": Counterpart("evaluation.load_best_model_at_end"),
        "metric_for_best_model": Counterpart("evaluation.metric_for_best_model"),
        "greater_is_better": Counterpart("evaluation.greater_is_better"),
        "early_stopping_patience": Counterpart("evaluation.early_stopping_patience"),
        "early_stopping_threshold": Counterpart("evaluation.early_stopping_threshold"),
        "neftune_noise_alpha": Counterpart("", "embeddings get no noise"),
        "group_by_length": Counterpart("", "micro-batches are filled up to a number of tokens"),
        "dataloader_num_workers": Counterpart("", "batches are made without worker processes"),
        "dataloader_pin_memory": Counterpart("", "batches are made without worker processes"),
        "dataloader_prefetch_factor": Counterpart("", "batches are made without worker processes"),
        # Ranks
        "ddp_find_unused_parameters": Counterpart("", "parallel.shard: 1 needs no such search"),
        "ddp_timeout": Counterpart("", "collectives time out after 30 minutes"),
        "deepspeed": Counterpart("parallel", "FSDP2 shards the model; torchrun starts the ranks"),
        "fsdp": Counterpart("parallel", "FSDP2 shards the model; torchrun starts the ranks"),
        "fsdp_config": Counterpart("parallel", "reshard_after_forward and cpu_offload"),
    },
    "TRL": {
        # Model
        "model_name_or_path": Counterpart("model.path"),
        "model_revision": Counterpart("", "set model.path to a folder with that revision"),
        "torch_dtype": Counterpart("model.dtype"),
        "dtype": Counterpart("model.dtype"),
        "attn_implementation": Counterpart("model.attn_implementation"),
        "use_liger_kernel": Counterpart("model.kernels", "liger; the loss is fused in any case"),
        "model_init_kwargs": Counterpart("model", "dtype and attn_implementation are keys there"),
        "disable_dropout": Counterpart("", "dropout of the model is always off"),
        "use_cache": Counterpart("", "training never uses a key-value cache"),
        # Adapter
        "use_peft": Counterpart("adapter", "lora"),
        "use_rslora": Counterpart("adapter.rslora"),
        "use_dora": Counterpart("adapter.dora"),
        "bnb_4bit_quant_type": Counterpart("adapter.quantize", "nf4"),
        "use_bnb_nested_quant": Counterpart("", "adapter.quantize: nf4 is always nested"),
        # Data
        "dataset_name": Counterpart("data.train", "a file or a Hub name"),
        "dataset_config": Counterpart("data.train", "a file or a Hub name"),
        "dataset_train_split": Counterpart("data.train", "org/name:split"),
        "dataset_test_split": Counterpart("data.eval", "org/name:split"),
        "dataset_streaming": Counterpart("data.streaming"),
        "dataset_num_proc": Counterpart("", "tokens are cached in data.cache"),
        "max_length": Counterpart("data.max_length"),
        "max_prompt_length": Counterpart("data.max_prompt_length"),
        "completion_only_loss": Counterpart("data.sft_on", "completion or all"),
        "assistant_only_loss": Counterpart("data.sft_on", "assistant"),
        "max_completion_length": Counterpart(
            "", "data.max_length bounds prompt and response, and data.truncation says what is cut"
        ),
        "truncation_mode": Counterpart("data.truncation", "keep_start or keep_end"),
        "chat_template_path": Counterpart("data.chat_template"),
        "padding_free": Counterpart("training.layout", "auto never pads where it can be avoided"),
        "remove_unused_columns": Counterpart(
            "", "columns that an objective does not use are ignored"
        ),
        # Objective and reference
        "loss_type": Counterpart("loss.name", "sigmoid is dpo; `fastpref losses` lists names"),
        "loss_weights": Counterpart("loss", "a list of objectives, each with a weight"),
        "beta": Counterpart("loss.beta"),
        "label_smoothing": Counterpart("loss.label_smoothing"),
        "label_smoothing_factor": Counterpart("loss.label_smoothing"),
        "ld_alpha": Counterpart("loss.ld_alpha"),
        "f_divergence_type": Counterpart("loss.f_divergence"),
        "f_alpha_divergence_coef": Counterpart("loss.f_alpha"),
        "use_weighting": Counterpart("loss.wpo"),
        "discopop_tau": Counterpart("loss.tau"),
        "simpo_gamma": Counterpart("loss.gamma"),
        "cpo_alpha": Counterpart("loss.lam"),
        "ref_model": Counterpart("reference", "cached or frozen: the model before training"),
        "ref_model_name_or_path": Counterpart(
            "reference", "cached or frozen: the model before training"
        ),
        "precompute_ref_batch_size": Counterpart("training.micro_batch_tokens"),
        "reference_free": Counterpart(
            "loss.name", "an objective without a reference, such as simpo"
        ),
        "sync_ref_model": Counterpart("", "the reference does not change during training"),
        "ref_model_sync_steps": Counterpart("", "the reference does not change during training"),
        "ref_model_mixup_alpha": Counterpart("", "the reference does not change during training"),
        # Optimizer
        "optim_args": Counterpart("optim"),
        "lr_scheduler_type": Counterpart("optim.schedule", "constant, linear or cosine"),
        "lr_scheduler_kwargs": Counterpart("", "linear and cosine end at 0"),
        # Training
        "per_device_train_batch_size": Counterpart(
            "training.micro_batch_tokens", "in tokens; training.batch_size is the whole step"
        ),
        "per_device_eval_batch_size": Counterpart("training.micro_batch_tokens", "in tokens"),
        "auto_find_batch_size": Counterpart("", "`fastpref plan` says what fits"),
        "num_train_epochs": Counterpart("training.epochs", "a whole number"),
        "activation_checkpointing": Counterpart("training.activation_checkpointing"),
        "data_seed": Counterpart("training.seed"),
        "full_determinism": Counterpart("", "the same config and seed give the same batches"),
        "overwrite_output_dir": Counterpart("", "set training.output_dir to a new folder"),
        "logging_strategy": Counterpart("training.log_every", "in steps"),
        "logging_first_step": Counterpart("training.log_every", "in steps"),
        "report_to": Counterpart(
            "training.report_to", "a list of tensorboard, wandb, mlflow, trackio"
        ),
        "run_name": Counterpart("training.output_dir", "the name of the folder is the run's name"),
        "save_only_model": Counterpart("", "model/ in the run directory has no optimizer state"),
        "hub_strategy": Counterpart("", "training.push_to_hub uploads the final model"),
        "hub_token": Counterpart("", "set HF_TOKEN, or log in with `hf auth login`"),
        "hub_private_repo": Counterpart("training.hub_private_repo"),
        "push_to_hub": Counterpart("training.push_to_hub", "true, with training.hub_model_id"),
        "trackio_space_id": Counterpart("training.report_to", "[trackio]; set TRACKIO_SPACE_ID"),
        "log_completions": Counterpart("evaluation.samples", "a number of prompts"),
        "do_train": Counterpart("", "`fastpref train` trains"),
        "do_eval": Counterpart("data.eval", "it is evaluated if it is set"),
        "use_cpu": Counterpart("training.device", "cpu"),
        "log_level": Counterpart("", "only notes and metrics are printed"),
        "disable_tqdm": Counterpart("", "a progress bar is shown in a terminal only"),
    },
    "axolotl": {
        # Model
        "base_model": Counterpart("model.path"),
        "base_model_config": Counterpart("", "the model brings its own config"),
        "model_type": Counterpart("", "the model's config names its class"),
        "tokenizer_type": Counterpart("", "the tokenizer's config names its class"),
        "tokenizer_config": Counterpart("model.tokenizer"),
        "revision_of_model": Counterpart("", "set model.path to a folder with that revision"),
        "flash_attention": Counterpart("model.attn_implementation", "flash_attention_2"),
        "sdp_attention": Counterpart("model.attn_implementation", "sdpa"),
        "eager_attention": Counterpart("model.attn_implementation", "eager"),
        "xformers_attention": Counterpart("model.attn_implementation", "sdpa"),
        "plugins": Counterpart("model.kernels", "liger"),
        "liger_rope": Counterpart("model.kernels", "liger"),
        "liger_rms_norm": Counterpart("model.kernels", "liger"),
        "liger_glu_activation": Counterpart("model.kernels", "liger"),
        "liger_fused_linear_cross_entropy": Counterpart("", "the loss is always fused"),
        # Adapter
        "lora_model_dir": Counterpart("adapter.path"),
        "lora_target_linear": Counterpart("adapter.target_modules", "all-linear is the default"),
        "lora_fan_in_fan_out": Counterpart("", "the layers' type decides it"),
        "peft_use_rslora": Counterpart("adapter.rslora"),
        "peft_use_dora": Counterpart("adapter.dora"),
        # Data
        "datasets": Counterpart("data.train", "a file, a Hub name, or a list of {path, …}"),
        "test_datasets": Counterpart("data.eval", "a file, a Hub name, or a list of {path, …}"),
        "val_set_size": Counterpart("data.eval", "a file or a Hub name, not a share"),
        "dataset_prepared_path": Counterpart("data.cache"),
        "sequence_len": Counterpart("data.max_length"),
        "sample_packing": Counterpart("training.layout", "auto packs where it can"),
        "eval_sample_packing": Counterpart("training.layout", "auto packs where it can"),
        "pad_to_sequence_len": Counterpart("", "padding is avoided where possible"),
        "chat_template": Counterpart("data.chat_template", "chatml, or a Jinja file"),
        "chat_template_jinja": Counterpart("data.chat_template", "a file or the template itself"),
        "special_tokens": Counterpart(
            "model.tokenizer", "a tokenizer with these tokens; its own are used"
        ),
        "train_on_inputs": Counterpart("data.sft_on", "all, or leave it out for false"),
        # Objective and reference
        "rl": Counterpart("loss.name", "`fastpref losses` lists names"),
        "rl_beta": Counterpart("loss.beta"),
        "dpo_beta": Counterpart("loss.beta"),
        "orpo_alpha": Counterpart("loss.lam"),
        "dpo_label_smoothing": Counterpart("loss.label_smoothing"),
        "dpo_use_weighting": Counterpart("loss.wpo"),
        "kto_desirable_weight": Counterpart("loss.desirable_weight"),
        "kto_undesirable_weight": Counterpart("loss.undesirable_weight"),
        "rl_adapter_ref_model": Counterpart("reference", "frozen, instead of adapter"),
        # Optimizer
        "optimizer": Counterpart("optim.name", OPTIMIZERS),
        "lr_scheduler": Counterpart("optim.schedule", "constant, linear or cosine"),
        "cosine_min_lr_ratio": Counterpart("", "cosine ends at 0"),
        # Training
        "num_epochs": Counterpart("training.epochs", "a whole number"),
        "micro_batch_size": Counterpart(
            "training.micro_batch_tokens", "in tokens; training.batch_size is the whole step"
        ),
        "eval_batch_size": Counterpart("training.micro_batch_tokens", "in tokens"),
        "evals_per_epoch": Counterpart("training.eval_every", "in steps"),
        "saves_per_epoch": Counterpart("training.checkpoint_every", "in steps"),
        "save_safetensors": Counterpart("", "weights are always saved as safetensors"),
        "eval_table_size": Counterpart("evaluation.samples", "a number of prompts"),
        "eval_max_new_tokens": Counterpart("evaluation.max_new_tokens"),
        "use_mlflow": Counterpart("training.report_to", "[mlflow]"),
        "mlflow_tracking_uri": Counterpart(
            "training.report_to", "[mlflow]; set MLFLOW_TRACKING_URI"
        ),
        "mlflow_experiment_name": Counterpart(
            "training.report_to", "[mlflow]; set MLFLOW_EXPERIMENT_NAME"
        ),
        "mlflow_run_name": Counterpart(
            "training.output_dir", "the name of the folder is the run's name"
        ),
        "use_wandb": Counterpart("training.report_to", "[wandb]"),
        "wandb_project": Counterpart("training.report_to", "[wandb]; set WANDB_PROJECT"),
        "wandb_entity": Counterpart("training.report_to", "[wandb]; set WANDB_ENTITY"),
        "wandb_name": Counterpart(
            "training.output_dir", "the name of the folder is the run's name"
        ),
        "wandb_watch": Counterpart("", "gradients are not sent to wandb"),
        "wandb_log_model": Counterpart("", "weights are not sent to wandb"),
        "strict": Counterpart("", "unknown keys are always refused"),
        "local_rank": Counterpart("", "torchrun numbers the ranks"),
        "fsdp_version": Counterpart("", "sharding is always by FSDP2"),
    },
    "other trainers": {
        "trainer": Counterpart("training"),
        "batch_size": Counterpart("training.batch_size", "of the whole step, over all ranks"),
        "exp_name": Counterpart("training.output_dir", "the name of the folder is the run's name"),
        "n_epochs": Counterpart("training.epochs"),
    },
}
KEYS = {
    key: (trainers, counterpart)
    for trainers, keys in BY_TRAINER.items()
    for key, counterpart in keys.items()
}

# Sections of torchtitan, and what replaces a key of theirs that is not in TORCHTITAN.
TORCHTITAN_SECTIONS = {
    "job": Counterpart("", "training.output_dir names the run"),
    "optimizer": Counterpart("", "optim has the settings of the optimizer"),
    "lr_scheduler": Counterpart("", "optim.schedule ends at 0, and optim.warmup_steps begins it"),
    "parallelism": Counterpart("", "FSDP2 is the only parallelism; parallel has its settings"),
    "checkpoint": Counterpart("", "checkpoints are complete, and model/ has the trained weights"),
    "activation_checkpoint": Counterpart("", "training.activation_checkpointing is one word"),
    "compile": Counterpart("", "training.compile is true or false"),
    "metrics": Counterpart("", "metrics are always written to metrics.jsonl"),
    "profiling": Counterpart("", "run `fastpref train --profile`"),
    "validation": Counterpart("", "data.eval is evaluated in full"),
    "memory_estimation": Counterpart("", "run `fastpref plan`"),
    "fault_tolerance": Counterpart("", "resume: auto continues a run"),
    "float8": Counterpart("", "adapter.quantize: nf4 is the only quantization"),
    "mx": Counterpart("", "adapter.quantize: nf4 is the only quantization"),
    "quantize": Counterpart("", "adapter.quantize: nf4 is the only quantization"),
    "comm": Counterpart("", "collectives time out after 30 minutes"),
    "experimental": Counterpart("", "objectives are added in Python"),
    "debug": Counterpart("", "the same config and seed give the same batches"),
}
TORCHTITAN = {
    "job.dump_folder": Counterpart("training.output_dir"),
    "model.name": Counterpart("model.path", "a folder or a Hub name"),
    "model.flavor": Counterpart("model.path", "a folder or a Hub name"),
    "model.tokenizer_path": Counterpart("model.tokenizer"),
    "model.hf_assets_path": Counterpart("model.path", "a folder or a Hub name"),
    "model.converters": Counterpart("", "adapter.quantize: nf4 is the only quantization"),
    "optimizer.name": Counterpart("optim.name", OPTIMIZERS),
    "optimizer.lr": Counterpart("optim.lr"),
    "optimizer.beta1": Counterpart("optim.betas", "a list of both"),
    "optimizer.beta2": Counterpart("optim.betas", "a list of both"),
    "optimizer.eps": Counterpart("optim.eps"),
    "optimizer.weight_decay": Counterpart("optim.weight_decay"),
    "lr_scheduler.warmup_steps": Counterpart("optim.warmup_steps"),
    "lr_scheduler.decay_type": Counterpart("optim.schedule", "constant, linear or cosine"),
    "training.local_batch_size": Counterpart(
        "training.micro_batch_tokens", "in tokens; training.batch_size is the whole step"
    ),
    "training.global_batch_size": Counterpart("training.batch_size"),
    "training.seq_len": Counterpart("data.max_length"),
    "training.max_norm": Counterpart("optim.max_grad_norm"),
    "training.dataset": Counterpart("data.train", "a file or a Hub name"),
    "training.dataset_path": Counterpart("data.train", "a file or a Hub name"),
    "training.mixed_precision_param": Counterpart("model.dtype"),
    "training.mixed_precision_reduce": Counterpart("", "gradients are reduced in float32"),
    "training.enable_cpu_offload": Counterpart("parallel.cpu_offload"),
    "training.gc_freq": Counterpart("", "the trainer collects garbage at fixed steps"),
    "training.deterministic": Counterpart("", "the same config and seed give the same batches"),
    "training.warmup_steps": Counterpart("optim.warmup_steps"),
    "parallelism.data_parallel_replicate_degree": Counterpart("parallel.replicate"),
    "parallelism.data_parallel_shard_degree": Counterpart(
        "parallel.shard", "leave it out instead of -1"
    ),
    "parallelism.fsdp_reshard_after_forward": Counterpart(
        "parallel.reshard_after_forward", "true or false"
    ),
    "checkpoint.enable": Counterpart("training.checkpoint_every", "null for none"),
    "checkpoint.enable_checkpoint": Counterpart("training.checkpoint_every", "null for none"),
    "checkpoint.interval": Counterpart("training.checkpoint_every"),
    "checkpoint.folder": Counterpart("training.output_dir", "checkpoints/ is in it"),
    "checkpoint.keep_latest_k": Counterpart("training.keep_checkpoints"),
    "checkpoint.load_step": Counterpart("resume", "auto, or the folder of a checkpoint"),
    "checkpoint.initial_load_path": Counterpart("model.path"),
    "activation_checkpoint.mode": Counterpart(
        "training.activation_checkpointing", "auto, full, selective, off or a number of blocks"
    ),
    "compile.enable": Counterpart("training.compile"),
    "metrics.log_freq": Counterpart("training.log_every"),
    "metrics.enable_tensorboard": Counterpart("training.report_to", "[tensorboard]"),
    "metrics.enable_wandb": Counterpart("training.report_to", "[wandb]"),
    "validation.dataset": Counterpart("data.eval"),
    "validation.dataset_path": Counterpart("data.eval"),
    "validation.freq": Counterpart("training.eval_every"),
    "debug.seed": Counterpart("training.seed"),
}
