"""The engine that a run is launched with, by its training arguments or by `accelerate launch`; known before any model is."""

from __future__ import annotations

import os

from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments


def fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP, or None for a run without."""
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return FullyShardedDataParallelPlugin()
    return None


def zero_stage(args: TrainingArguments) -> int:
    """DeepSpeed's ZeRO stage: 3 if parameters are partitioned over processes; 0 for a run without."""
    return 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage


def engine_name(args: TrainingArguments) -> str | None:
    """For the record of a run: each engine writes checkpoints that another one cannot read."""
    if (plugin := fsdp_plugin(args)) is not None:
        return f"FSDP{plugin.fsdp_version}"
    return None if args.deepspeed_plugin is None else f"ZeRO-{zero_stage(args)}"
