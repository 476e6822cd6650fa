"""Defaults of the training commands for ``TrainingArguments``, without an import of torch."""

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


def training_note(defaults: dict[str, Any]) -> str:
    """The end of a command's help, which names further options and their defaults."""
    return (
        "Any field of transformers.TrainingArguments is an option too, e.g. --gradient_accumulation_steps 4 "
        "--gradient_checkpointing true --seed 1, or a line of --training-yaml. Set unless given: "
        + ", ".join(f"{name} {value}" for name, value in defaults.items())
        + "."
    )
