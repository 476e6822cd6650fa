"""A training step under FSDP2 over many processes, run in one, on tensors without data: which collectives it calls.

Real are the code of torch's ``fully_shard``, of accelerate's wrapping, and of this package; the process group is torch's fake one,
in which nothing travels. Used by `scale.py` and by the tests of `peft_caft.planning.communication`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from peft_caft.planning.communication import Communication
from peft_caft.planning.live_memory import Simulation
from peft_caft.planning.simulated_step import Batch

GATHERED, REDUCED = "_allgather_base_", "_reduce_scatter_base_"


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """This process as the first of ``count``, none of which is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ShardedStep:
    """What a step was seen to do.

    Attributes:
        sent: bytes that a device sends, were every collective a ring.
        shards: bytes of the parts of parameters that a device keeps.
        whole: the most bytes of parameters that were whole together in the backward pass, with those that were on their way.
        kept: bytes of other tensors that were there between forward and backward pass.
    """

    sent: Communication
    shards: float
    whole: float
    kept: float


def sharded_step(model: PeftModel, batch: Batch, checkpointing: bool = False) -> ShardedStep:
    """Shard ``model`` as ``accelerate launch`` does with `examples/accelerate/fsdp2.yaml`, and train one step.

    Args:
        model: from `peft_caft.planning.simulated_step.model_on_meta`; it is of no use afterwards.
        batch: of one device.
        checkpointing: gradient checkpointing.
    """
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    simulation = _Collectives(model)
    simulation.take_over(model)
    model.zero_grad()  # take_over has made gradients
    with warnings.catch_warnings(), simulation:
        warnings.simplefilter("ignore")
        _shard(model)
        for _ in range(2):  # the first step also compares fast ways with plain ones
            simulation.restart()
            model.zero_grad()
            before = sum(simulation.live.values())
            loss = model(**batch.arguments()).loss
            kept = sum(simulation.live.values()) - before
            simulation.in_backward = True
            loss.backward()
    shards = [p._local_tensor.untyped_storage().nbytes() for p in model.parameters() if isinstance(p, DTensor)]
    if len(shards) != len(list(model.parameters())):
        raise RuntimeError("sharded_step: parameters are left that FSDP2 did not divide.")
    return ShardedStep(Communication(**simulation.sent), sum(shards), simulation.whole, kept)


def _shard(model: nn.Module) -> None:
    """`fsdp2_prepare_model`, with what it asks of an ``Accelerator``, which itself would want the devices to be there."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shards",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("shards",)),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, model)


class _Collectives(Simulation):
    """Adds up what collectives would send.

    Raises:
        NotImplementedError: in a collective whose bytes are not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.restart()

    def restart(self) -> None:
        self.sent = {"forward": 0.0, "backward": 0.0, "gradients": 0.0}
        self.in_backward = False
        self.whole = 0.0

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._add(func._opname, args)
        return super()._run(func, args, kwargs)

    def _add(self, name: str, args: tuple) -> None:
        if name not in (GATHERED, REDUCED):
            raise NotImplementedError(f"collective: got {name}, expected {GATHERED} or {REDUCED}.")
        output, given = (tensor.nbytes for tensor in args[:2])
        part = "gradients" if name == REDUCED else "backward" if self.in_backward else "forward"
        self.sent[part] += abs(output - given)  # a ring passes on all but one of N equal parts
        if self.in_backward:
            gathered = output if name == GATHERED else 0
            self.whole = max(self.whole, gathered + _whole_bytes(self.model))


def _whole_bytes(model: nn.Module) -> float:
    """Bytes of the parameters that FSDP keeps whole at this moment."""
    states = {m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)}  # modules may share one
    groups = [group for state in states for group in state._fsdp_param_groups if group.is_unsharded]
    tensors: list[Tensor] = [t for group in groups for p in group.fsdp_params for t in p.all_gather_outputs]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
