"""``TrainingArguments`` for the command line: from a YAML file, from ``--name value`` options, with our defaults."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from .defaults import COMMON


def trainer_arguments(
    output: str, defaults: dict[str, Any], yaml_file: str | None = None, options: list[str] | None = None
) -> TrainingArguments:
    """TrainingArguments, each value from the first of: ``options``, ``yaml_file``, ``defaults``, transformers.

    Args:
        output: run folder; checkpoints go below it.
        defaults: what the command sets unless told otherwise.
        yaml_file: mapping of TrainingArguments fields.
        options: as on a command line, e.g. ``["--learning_rate", "1e-4"]``.

    Raises:
        FileNotFoundError: if there is no such YAML file.
        ValueError: naming an option or YAML key that TrainingArguments lacks, or a value it refuses.
    """
    # Pinning without a GPU only warns.
    values = {"dataloader_pin_memory": torch.cuda.is_available()} | COMMON | defaults | _yaml(yaml_file)
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(**values)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            ["--output_dir", str(Path(output) / "checkpoints"), *(options or [])], return_remaining_strings=True
        )
    except ArgumentError as error:
        raise ValueError(f"training options: {error}. Expected a value that TrainingArguments takes.") from error
    if unknown:
        raise ValueError(
            f"{unknown[0]}: unknown option, expected one of this command or a field of transformers.TrainingArguments "
            "such as --learning_rate or --num_train_epochs (with underscores)."
        )
    return arguments


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The trainer arguments that decide a result, for comparing a run with the one that it would resume."""
    names = (
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "optim",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "train_sampling_strategy",
        "seed",
        "data_seed",
    )
    return {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in names}


def _yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"--training-yaml: {path} is not a file, expected a YAML mapping of TrainingArguments."
        )
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    if not isinstance(values, dict) or set(values) - known:
        wrong = sorted(set(values) - known) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: got {wrong}, expected a mapping of fields of transformers.TrainingArguments.")
    return values
