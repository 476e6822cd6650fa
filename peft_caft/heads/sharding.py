"""Parameters that an engine has sharded over processes, read and written whole.

FSDP2 makes them DTensors. DeepSpeed's ZeRO-3 makes them empty tensors with the attributes ``ds_id``
and ``ds_shape``, already when transformers loads the model. All processes call the functions that
read or write values together.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 shards parameters of ``module``, or of a part of it.

    Their hooks gather them for whole forward and backward passes of such a module only.
    """
    return any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()) or any(
        isinstance(parameter, DTensor) or _is_partitioned(parameter) for parameter in module.parameters()
    )


def refuse_fsdp1(model: nn.Module) -> None:
    """Raise a ValueError if FSDP1 has wrapped the model."""
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            "fsdp_version: got 1, expected 2: FSDP1 flattens the parameters of a layer, or of a head, into one, so that none "
            "of them can be read or saved by itself. Set fsdp_version: 2, as examples/accelerate/fsdp2.yaml does."
        )


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; processes need not call this together."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, any shape, same dtype: itself, or a copy without graph if sharded."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if not _is_partitioned(parameter):
        return parameter
    with gathered([parameter]):
        return parameter.detach().clone()


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """The module's own parameter of that name, any shape, sharded or not; or None."""
    # In a forward pass under ZeRO-3, ``module.name`` would gather it, in all later passes too.
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    return getattr(module, name, None) if parameter is None else parameter


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside the block, parameters that ZeRO-3 has sharded are whole and may be read."""
    # Parameters that are whole already, like small ones, must stay so.
    partitioned = [p for p in parameters if _is_partitioned(p) and p.ds_status.name != "AVAILABLE"]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


@torch.no_grad()
def copy_into(parameter: Tensor, values: Tensor) -> None:
    """Set the whole parameter, any shape, to ``values``, same shape, any dtype."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))
    elif _is_partitioned(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # whose values all processes get
            parameter.copy_(values)
    else:
        parameter.copy_(values)


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")
