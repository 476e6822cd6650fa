"""`accelerate launch ... -m tests.support.fsdp_on_cpu train-heads ...`: the command line, or a script, with FSDP on processes without GPU.

torch shards over gloo as over any backend, but accelerate 1.15 leaves its FSDP plugin aside where the devices are CPUs
(`AcceleratorState.__init__`). This says what it says itself on any other device; everything else is the real code. And
FSDP1 looks for its parameters on ``cpu:0``, where no tensor says to be.
"""

import runpy
import sys
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.fsdp import _init_utils

from peft_caft.cli.app import main

initialise = AcceleratorState.__init__


def with_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


def without_index(*args: Any) -> torch.device:
    return torch.device("cpu")


if __name__ == "__main__":
    AcceleratorState.__init__ = with_plugin
    _init_utils._get_device_from_device_id = without_index
    if sys.argv[1].endswith(".py"):
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
