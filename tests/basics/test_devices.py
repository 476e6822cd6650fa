"""Every kind of device gets an answer: which one is chosen, what it is called, how much memory it has."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate.state
import psutil
import pytest
import torch
from transformers import TrainingArguments

from peft_caft.basics import devices
from peft_caft.basics.provenance import machine, peak_memory_mib

from ..support.accelerators import no_state, pretend  # noqa: F401 (a fixture)

GIB = 2**30
ALLOCATOR = {
    "get_device_name": lambda: "Card",
    "memory_reserved": lambda device: 5 * GIB,
    "memory_allocated": lambda device: 3 * GIB,
    "mem_get_info": lambda device: (10 * GIB, 16 * GIB),
    "max_memory_allocated": lambda: 4 * GIB,
}
KINDS = ("cuda", "xpu", "hpu", "mtia")


@pytest.mark.usefixtures("no_state")
@pytest.mark.parametrize("kind", ["xpu", "npu", "mps", "hpu", "mlu", "cuda"])
def test_the_device_is_the_one_of_accelerate(kind, monkeypatch):
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # accelerate sets it for mps
    module, name = (torch.cuda, "is_available") if kind == "cuda" else (accelerate.state, f"is_{kind}_available")
    monkeypatch.setattr(module, name, lambda *args, **kwargs: True)
    if kind in ("npu", "mlu"):  # a name that torch takes only with their package
        monkeypatch.setattr(torch, "device", lambda name: SimpleNamespace(type=name))
    monkeypatch.setattr(accelerate.state, "check_cuda_p2p_ib_support", lambda: True)
    assert devices.chosen_device().type == kind


@pytest.mark.usefixtures("no_state")
def test_the_device_is_the_cpu_where_accelerate_is_told_so(monkeypatch):
    pretend(monkeypatch, "xpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.chosen_device() == torch.device("cpu")


@pytest.mark.usefixtures("no_state")
def test_the_device_is_that_of_a_trainer_before(monkeypatch, tmp_path):
    pretend(monkeypatch, "xpu")
    assert TrainingArguments(str(tmp_path), use_cpu=True).device == torch.device("cpu")
    assert devices.chosen_device() == torch.device("cpu")


@pytest.mark.usefixtures("no_state")
def test_the_device_is_the_cpu_without_an_accelerator():
    if torch.accelerator.is_available():
        pytest.skip("has an accelerator")
    assert devices.chosen_device() == torch.device("cpu")
    assert devices.accelerators() is None
    assert devices.peak_bytes() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_tells_its_name_and_memory(kind, monkeypatch):
    pretend(monkeypatch, kind, **ALLOCATOR)
    assert machine().endswith(", 2 x Card")
    assert peak_memory_mib() == 4096
    assert devices.free_bytes(torch.device(kind)) == 12 * GIB  # what the allocator keeps for later is free too


def test_apples_device_shares_the_memory_of_the_cpu(monkeypatch):
    pretend(monkeypatch, "mps", driver_allocated_memory=lambda: 2 * GIB)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7 * GIB))
    assert machine().endswith(", Apple M4")
    assert peak_memory_mib() == 2048
    assert devices.free_bytes(torch.device("mps")) == 7 * GIB


def test_a_device_that_does_not_tell_has_safe_answers(monkeypatch):
    """Intel's integrated GPUs raise an error when asked for free memory."""

    def refuses(device):
        raise RuntimeError("The device doesn't support querying the available free memory.")

    pretend(monkeypatch, "xpu", **ALLOCATOR | {"mem_get_info": refuses})
    assert devices.free_bytes(torch.device("xpu")) == float("inf")
    pretend(monkeypatch, "hpu")
    assert machine().endswith(", 2 x HPU")
    assert devices.free_bytes(torch.device("hpu")) == devices.free_bytes(torch.device("meta")) == float("inf")
    assert peak_memory_mib() > 10  # of the process


def test_an_accelerator_that_was_not_used_has_no_peak(monkeypatch):
    pretend(monkeypatch, "xpu", **ALLOCATOR | {"max_memory_allocated": lambda: 0})
    assert peak_memory_mib() > 10  # of the process
