"""Heads whose parameters FSDP2 or ZeRO-3 has spread over the processes: whole ones from them, whole ones into them.

All processes call `gather` and `scatter` together.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from .engine import fsdp_plugin, zero_stage
from .heads import AuxiliaryHeads
from .sharding import copy_into, whole


def sharding_requested(args: TrainingArguments, cache: str | None) -> bool:
    """Whether the run shards its models, by its arguments or by ``accelerate launch``.

    Raises:
        ValueError: if it does so in a way that stage 1 does not support.
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


def gather(heads: AuxiliaryHeads, target: AuxiliaryHeads) -> None:
    """Copy the parameters of sharded ``heads`` into ``target``, heads of the same shape."""
    for name, parameter in heads.named_parameters():
        copy_into(target.get_parameter(name), whole(parameter))


def scatter(source: AuxiliaryHeads, heads: AuxiliaryHeads) -> None:
    """Copy the parameters of ``source`` into sharded ``heads``; each process keeps its shards."""
    for name, parameter in heads.named_parameters():
        copy_into(parameter, source.get_parameter(name))


def reshard(model: nn.Module) -> None:
    """Drop the whole parameters that an evaluation left in the outermost module: only shards may be read and saved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
