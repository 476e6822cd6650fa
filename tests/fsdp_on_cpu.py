"""`accelerate launch ... -m tests.fsdp_on_cpu train-heads ...`: the command line with FSDP on processes without accelerator.

torch shards over gloo as over any backend, but accelerate 1.15 leaves its FSDP plugin aside where the devices are CPUs
(`AcceleratorState.__init__`). This says what it says itself on any other device; everything else is the real code.
"""

from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from peft_caft.cli import main

initialise = AcceleratorState.__init__


def with_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = with_plugin
    main()
