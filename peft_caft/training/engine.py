"""The engine that a run was launched with, FSDP, DeepSpeed or none, and what it shards."""

import os

from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..basics.run_folder import random_states
from ..heads.sharding import copy_into, whole


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


def checkpoint_files(args: TrainingArguments) -> tuple[str, ...]:
    """Names of files without which Trainer would resume a run otherwise than it left off."""
    own = ("optimizer.pt", "scheduler.pt") if engine_name(args) is None else ()
    return (*random_states(args.world_size), *own)


def divides_parameters(args: TrainingArguments) -> bool:
    """Whether the engine keeps parts of each parameter in several processes: FSDP or ZeRO-3."""
    return fsdp_plugin(args) is not None or zero_stage(args) == 3


def sharding_requested(args: TrainingArguments, cache: str | None) -> bool:
    """Whether the engine shards the models of stage 1 over processes.

    Raises:
        ValueError: if stage 1 does not support the settings of the engine.
    """
    if not divides_parameters(args):
        return False
    plugin = fsdp_plugin(args)
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


def shards_parameters(trainer: Trainer) -> bool:
    """Whether each process of the trainer holds a part of the model, at the latest in training."""
    return trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled())


def gather(heads: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of sharded ``heads`` into ``target``, a module of the same shapes."""
    for name, parameter in heads.named_parameters():
        copy_into(target.get_parameter(name), whole(parameter))


def scatter(source: nn.Module, heads: nn.Module) -> None:
    """Copy the parameters of ``source``, a module of the same shapes, into sharded ``heads``."""
    for name, parameter in heads.named_parameters():
        copy_into(parameter, source.get_parameter(name))


def reshard(model: nn.Module) -> None:
    """Drop the whole parameters that an evaluation left: only shards may be read and saved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
