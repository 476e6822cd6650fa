"""Stand-ins for accelerators that no test machine has: what torch and accelerate say of them is set, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str, **functions: Callable) -> None:
    """Let ``kind``, such as ``"xpu"``, be the accelerator of this machine; ``torch.KIND`` has these functions alone."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, kind, SimpleNamespace(**functions), raising=False)
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: torch.device(kind)))


@pytest.fixture
def no_state() -> Iterator[None]:
    """For tests of the device that accelerate chooses: it forgets that of an earlier test, and theirs for later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
