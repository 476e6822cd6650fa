"""Parameters that an engine has spread over processes: whether they are, and how to get them whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 keeps the parameters of ``module``, or of a part of it, in several processes.

    Its hooks gather them around whole forward and backward passes of such a module, and nothing less.
    """
    return any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in module.parameters()
    )


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter; all processes call it together."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to ``values``, all of it; each process keeps its part."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
