"""The device of this process, chosen as accelerate and Trainer do, and what it tells of its memory.

Devices other than CPU and CUDA were tried with stand-ins alone, not run.
"""

from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def chosen_device() -> torch.device:
    """The device that accelerate chooses, or chose for a Trainer in this process.

    That is the CPU with ``ACCELERATE_USE_CPU=true``, which ``accelerate launch --cpu`` sets; else
    an accelerator, of several processes each one's own; and the CPU if there is none.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def accelerators() -> str | None:
    """Number and name of the accelerators in words, such as "2 x NVIDIA H100"; None without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    if device.type == "mps":
        return torch.backends.mps.get_name()
    name = getattr(_module_of(device), "get_device_name", device.type.upper)
    return f"{torch.accelerator.device_count()} x {name()}"


def free_bytes(device: torch.device) -> float:
    """Bytes that a tensor on ``device`` could take; infinite where the device does not tell."""
    if device.type in ("cpu", "mps"):  # Apple's devices use the memory of the CPU
        return psutil.virtual_memory().available
    module = _module_of(device)
    try:
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + unused
    except (AttributeError, RuntimeError):  # some of Intel's GPUs do not tell, and have the method
        return float("inf")


def peak_bytes() -> int:
    """Most bytes that this process has had on its accelerator; 0 if none, or if it is not known."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return 0
    module = _module_of(device)
    if device.type == "mps":
        return module.driver_allocated_memory()  # no peak is kept, but what was taken is rarely returned
    return module.max_memory_allocated() if hasattr(module, "max_memory_allocated") else 0


def _module_of(device: torch.device) -> Any:
    """Such as ``torch.cuda``, or None; vendors' packages add theirs to torch."""
    return getattr(torch, device.type, None)
