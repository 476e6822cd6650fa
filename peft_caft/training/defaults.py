"""Defaults of the training commands for ``TrainingArguments``, and which fields they honour.

It imports no torch.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
}
# Learning rate and warm-up were measured in benchmarks/head_recipes.
STAGE_1: dict[str, Any] = COMMON | {
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "num_train_epochs": 1.0,
    "train_sampling_strategy": "group_by_length",
    "eval_strategy": "steps",
    "eval_steps": 0.2,
}
STAGE_2: dict[str, Any] = COMMON | {"learning_rate": 1e-4, "warmup_steps": 10, "num_train_epochs": 1.0}


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


# Fields that do not change the result. A run may be resumed with others; every other field is
# recorded and must be the same.
IRRELEVANT = {
    **_each("output_dir", "names a place"),
    **_each(
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica "
        "disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
        "include_num_input_tokens_seen",
        "says when, where and how a run reports",
    ),
    # Saving draws no random number. Evaluating does, and so decides on the dropout of later steps.
    **_each(
        "save_strategy save_steps save_total_limit save_on_each_node", "says when and where checkpoints are saved"
    ),
    **_each(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context",
        "says who prepares batches, not which rows they have",
    ),
    **_each("torch_empty_cache_steps skip_memory_metrics", "is about memory alone"),
    **_each("ddp_timeout local_rank", "is about the connection of processes"),
    **_each("do_train", "training is what the command does"),
}
# Fields that no command honours. A value other than the default is refused.
NOT_HONOURED = {
    **_each(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "`peft-caft push` publishes the result",
    ),
    **_each(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics do_predict",
        "no predictions are kept; `peft-caft evaluate` scores answers",
    ),
    **_each("resume_from_checkpoint", "an interrupted run in --output is resumed by itself"),
    **_each("save_only_model", "a run cannot be resumed without the optimizer's state"),
    **_each("ignore_data_skip", "a resumed run goes on with the rows that it has not seen"),
    **_each("enable_jit_checkpoint", "the run would end early and count as finished; set --save_steps"),
    **_each(
        "auto_find_batch_size",
        "free memory would decide on the batch, and so on the result; set --per_device_train_batch_size and "
        "--gradient_accumulation_steps",
    ),
    **_each("bf16_full_eval fp16_full_eval", "the last evaluation would round the weights that are saved"),
    **_each("remove_unused_columns label_names length_column_name", "rows hold token ids and labels alone"),
    **_each("parallelism_config", "no command divides a model in this way"),
    **_each("debug", "it is made for scripts, and fails on batches without supervised tokens"),
}

SET_BY_EARLY_STOPPING = (
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "save_strategy", "save_steps"),
    "restore_callback_states_from_checkpoint",
)
# Fields that a stage has no use for.
UNUSED_1 = {
    **_each("label_smoothing_factor", "heads learn from whole labels"),
    **_each("neftune_noise_alpha", "heads learn from the hidden states of the text as it is"),
    **_each(
        "activation_checkpointing gradient_checkpointing use_liger_kernel",
        "the base model is frozen, and no gradient passes it",
    ),
}
UNUSED_2 = _each("restore_callback_states_from_checkpoint", "no callback has a state to restore")
UNUSED_WITHOUT_EVAL_DATA = _each(
    "eval_strategy do_eval eval_delay load_best_model_at_end per_device_eval_batch_size",
    "there are no held-out data; give them with --eval-data",
)
UNUSED_BESIDE_HEADS = _each("load_best_model_at_end", "the trained heads would stay those of the last step")


def training_note(defaults: dict[str, Any]) -> str:
    """The end of a command's help, which names further options and their defaults."""
    return (
        "Any field of transformers.TrainingArguments is an option too, e.g. --gradient_accumulation_steps 4 "
        "--gradient_checkpointing true --seed 1, or a line of --training-yaml. Set unless given: "
        + ", ".join(f"{name} {value}" for name, value in defaults.items())
        + "."
    )
