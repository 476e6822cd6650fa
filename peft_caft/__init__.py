"""Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning as a PEFT method.

Names load on first use (PEP 562), so that ``import peft_caft`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .heads.auxiliary_heads import AuxiliaryHeads
    from .method.callback import CAFTCallback
    from .method.config import CAFTConfig
    from .method.full_fine_tuning import FullFineTuningConfig, prepare_full_fine_tuning
    from .method.load_adapter import load_adapter
    from .method.model import CAFTModel

__version__ = "0.1.0"
__all__ = [
    "AuxiliaryHeads",
    "CAFTCallback",
    "CAFTConfig",
    "CAFTModel",
    "FullFineTuningConfig",
    "load_adapter",
    "prepare_full_fine_tuning",
]

_MODULES = {
    "AuxiliaryHeads": "heads.auxiliary_heads",
    "CAFTCallback": "method.callback",
    "CAFTConfig": "method.model",  # which registers it with PEFT
    "CAFTModel": "method.model",
    "FullFineTuningConfig": "method.full_fine_tuning",
    "load_adapter": "method.load_adapter",
    "prepare_full_fine_tuning": "method.full_fine_tuning",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
