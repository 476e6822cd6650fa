"""Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning of language models as a PEFT method."""

from .adapters import load_adapter
from .callback import CAFTCallback
from .config import CAFTConfig
from .full_fine_tuning import FullFineTuningConfig, prepare_full_fine_tuning
from .heads import AuxiliaryHeads
from .model import CAFTModel
from .registration import register

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

register(CAFTConfig, CAFTModel)
