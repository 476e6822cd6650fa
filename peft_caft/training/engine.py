"""Which engine a run was launched with: FSDP, DeepSpeed or none. Known before a model is."""

from __future__ import annotations

import os

from accelerate import FullyShardedDataParallelPlugin
from transformers import TrainingArguments


def fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP; None for a run without FSDP."""
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return FullyShardedDataParallelPlugin()
    return None


def zero_stage(args: TrainingArguments) -> int:
    """DeepSpeed's ZeRO stage, 0 without DeepSpeed; stage 3 partitions the parameters."""
    return 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage


def engine_name(args: TrainingArguments) -> str | None:
    """The engine's name for the record of a run, since no other engine reads its checkpoints."""
    if (plugin := fsdp_plugin(args)) is not None:
        return f"FSDP{plugin.fsdp_version}"
    return None if args.deepspeed_plugin is None else f"ZeRO-{zero_stage(args)}"


def sharding_requested(args: TrainingArguments, cache: str | None) -> bool:
    """Whether the engine shards the models of stage 1 over processes.

    Args:
        cache: folder of cached hidden states, which a sharded run cannot use; None for no cache.

    Raises:
        ValueError: if the engine shards in a way that stage 1 does not support.
    """
    plugin = fsdp_plugin(args)
    if plugin is None and zero_stage(args) < 3:
        return False
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version: got {plugin.fsdp_version}, expected 2: FSDP1 flattens the frozen base model and the heads into "
            "one parameter. Set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does."
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: got true, expected false, since heads are made from the base model's weights "
            "in every process. Set it to false, as examples/accelerate/fsdp2.yaml does."
        )
    if cache is not None:
        raise ValueError(
            f"cache: got {cache!r} with a sharded model, expected none, since hidden states are computed before the engine runs "
            "it. Train without --cache, or with ddp.yaml or zero2.yaml of examples/accelerate if the base model fits on one device."
        )
    return True
