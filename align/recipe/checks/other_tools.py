"""Names of options in other tools, and the recipe key that does the same, for the hint about an unknown key.

The names are those of TRL, transformers, PEFT, LLaMA-Factory, axolotl, ms-swift, verl and OpenRLHF.
"""

from __future__ import annotations

_STEP = (
    "`train.batch_size`, the examples of a whole step over all processes; `train.microbatch_tokens` says how it is cut"
)
_OPTIMISER = "nothing to set: it is AdamW, with `train.adam_beta1` and its neighbours"
_ANSWER = "`max_new_tokens`"
_LENGTH = "`max_length`"
_EPOCHS = "`train.epochs`"
_HELD_OUT = "`eval_data`, a file of its own"
_PACKED = "rows are packed always; `train.layout` says how"

KEYS: dict[str, str] = {
    # adapters
    **dict.fromkeys(("r", "lora_r", "lora_rank", "lora_dim"), "`lora.rank`"),
    "lora_alpha": "`lora.alpha`",
    "lora_dropout": "`lora.dropout`",
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_modules", "target_module"), "`lora.target_modules`"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "qlora", "quantization"), "`lora.quantize`"),
    **dict.fromkeys(
        ("use_peft", "use_lora", "peft", "peft_config", "adapter", "finetuning_type"),
        "`lora`, with `{}` for the defaults",
    ),
    # step, schedule, length
    **dict.fromkeys(("lr", "learning_rates"), "`train.learning_rate`"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs", "epoch", "total_epochs", "max_epochs"), _EPOCHS),
    **dict.fromkeys(("num_steps", "max_train_steps", "total_steps", "steps", "max_iters"), "`train.max_steps`"),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_batch_size",
            "micro_batch_size",
            "micro_train_batch_size",
            "train_batch_size",
        ),
        _STEP,
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "accumulation_steps", "bsz"), _STEP
    ),
    "per_device_eval_batch_size": "`train.microbatch_tokens`, for evaluations too",
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_schedule", "lr_decay_style"), "`train.lr_scheduler_type`"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "lr_warmup_ratio", "num_warmup_steps"), "`train.warmup_ratio`, a share of all steps"
    ),
    **dict.fromkeys(
        ("min_lr", "min_learning_rate", "min_lr_rate", "cosine_min_lr_ratio"),
        "`train.min_lr_ratio`, a share of the peak",
    ),
    **dict.fromkeys(("optim", "optimizer", "optimizer_name"), _OPTIMISER),
    **dict.fromkeys(
        ("max_norm", "clip_grad", "gradient_clipping", "grad_clip", "grad_norm_clip"), "`train.max_grad_norm`"
    ),
    **dict.fromkeys(("bf16", "mixed_precision", "amp"), "`train.autocast: bf16`, with weights in `train.dtype`"),
    **dict.fromkeys(("fp16", "tf32"), "`train.autocast: bf16`; fp16 is not trained in"),
    **dict.fromkeys(("torch_dtype", "precision"), "`train.dtype`"),
    **dict.fromkeys(
        ("use_gradient_checkpointing", "activation_checkpointing", "recompute"), "`train.gradient_checkpointing`"
    ),
    **dict.fromkeys(
        ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "seq_length", "model_max_length", "max_len"),
        _LENGTH,
    ),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing", "padding_free", "group_by_length"), _PACKED),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "zero_stage", "ds_config"),
        "`train.sharding` divides a model among processes, `align run --nproc N` starts them",
    ),
    # data and models
    **dict.fromkeys(
        (
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_path",
            "train_file",
            "train_data",
            "train_files",
            "data_path",
            "train_dataset",
        ),
        "`data`",
    ),
    **dict.fromkeys(
        ("eval_dataset", "val_data", "validation_data", "validation_file", "eval_file", "test_data", "val_files"),
        _HELD_OUT,
    ),
    **dict.fromkeys(("val_size", "val_set_size", "test_size", "validation_split", "split_dataset_ratio"), _HELD_OUT),
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model_name", "model_id", "model_path", "pretrain"), "`model`, at the top"
    ),
    **dict.fromkeys(
        ("ref_model", "reference_model", "ref_model_path"), "nothing to set: the reference is the stage's `policy`"
    ),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_funcs", "reward_pretrain"), "`reward`"),
    **dict.fromkeys(("template", "prompt_template", "chat_template_path"), "`model.chat_template`, at the top"),
    "train_on_prompt": "nothing to set: only the assistant's messages are trained; see `train_on`",
    # logs, evaluation, checkpoints
    **dict.fromkeys(
        ("logging_steps", "log_steps", "log_interval", "logging_strategy"), "nothing to set: every step is logged"
    ),
    **dict.fromkeys(
        ("output_dir", "logging_dir", "save_path", "default_local_dir"), "nothing to set: see `align --runs-dir`"
    ),
    **dict.fromkeys(("run_name", "experiment_name", "wandb_name"), "`name`, at the top"),
    **dict.fromkeys(("wandb_project", "use_wandb", "loggers", "logger"), "`train.report_to`"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "eval_interval", "test_freq"), "`train.eval_steps`"),
    **dict.fromkeys(("save_strategy", "save_interval", "save_freq", "checkpoint_steps"), "`train.save_steps`"),
    **dict.fromkeys(
        ("load_best_model_at_end", "early_stopping"), "`train.load_best_model` and `train.early_stopping_patience`"
    ),
    # preferences and rollouts
    **dict.fromkeys(("loss_type", "pref_loss", "dpo_loss", "rlhf_loss"), "`loss`"),
    **dict.fromkeys(("pref_beta", "dpo_beta", "kl_beta"), "`beta`"),
    **dict.fromkeys(("simpo_gamma", "gamma_beta_ratio"), "`gamma`"),
    **dict.fromkeys(("rpo_alpha", "pref_ftx", "nll_loss_coef", "sft_coef"), "`sft_weight`"),
    **dict.fromkeys(
        ("num_generations", "group_size", "n_samples", "num_samples", "n_samples_per_prompt"), "`samples_per_prompt`"
    ),
    **dict.fromkeys(
        ("max_completion_length", "max_tokens", "response_length", "max_response_length", "generate_max_len"),
        "`max_new_tokens`",
    ),
    **dict.fromkeys(("kl_coef", "kl_coeff", "init_kl_coef", "init_kl_coeff", "kl_penalty"), "`kl_coefficient`"),
    **dict.fromkeys(("cliprange", "clip_range", "clip_ratio", "eps_clip", "epsilon"), "`clip`"),
    **dict.fromkeys(
        ("num_ppo_epochs", "num_iterations", "num_mini_batches", "mini_batch_size"), "`ppo_epochs` and `minibatches`"
    ),
    **dict.fromkeys(("adv_estimator", "advantage_estimator", "algorithm"), "`estimator`"),
    **dict.fromkeys(("critic_learning_rate", "critic_lr", "vf_lr"), "`value_learning_rate`"),
    **dict.fromkeys(("use_vllm", "inference_engine", "rollout_engine"), "`rollout.engine`"),
}
"""Another tool's name -> the key here, or why there is none."""

KINDS: dict[str, str] = {
    **dict.fromkeys(("finetune", "fine_tune", "instruct", "lora", "qlora", "full", "pt"), "sft"),
    **dict.fromkeys(("ipo", "simpo", "hinge", "preference", "pref"), "dpo"),
    **dict.fromkeys(("rm", "reward_model", "reward_modeling", "rw"), "reward"),
    **dict.fromkeys(("rlhf", "reinforce", "rl"), "ppo"),
    **dict.fromkeys(("kto", "grpo", "rloo", "orpo", "cpo", "online_dpo", "gmpo"), "trl"),
    **dict.fromkeys(("eval", "evaluation", "benchmark", "test"), "evaluate"),
}
"""Another tool's name -> the kind of stage that does it."""


def key_here(name: str) -> str | None:
    """The recipe key for another tool's ``name``, or why there is none; None for a name that no other tool has."""
    key = KEYS.get(name.lower().replace("-", "_"))
    if key is None:
        return None
    return key if key.startswith(("nothing to set", "rows ")) else f"here it is {key}"


def kind_here(name: str) -> str | None:
    """The kind of stage that ``name`` stands for in another tool."""
    kind = KINDS.get(name.lower().replace("-", "_"))
    return (
        None
        if kind is None
        else f"write `kind: {kind}`" + (f" with `trainer: {name.lower()}`" if kind == "trl" else "")
    )
