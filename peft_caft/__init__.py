"""Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning of language models as a PEFT method."""

from .adapters import load_adapter
from .callback import CAFTCallback
from .config import CAFTConfig
from .heads import AuxiliaryHeads
from .model import CAFTModel
from .registration import register

__version__ = "0.1.0"
__all__ = ["AuxiliaryHeads", "CAFTCallback", "CAFTConfig", "CAFTModel", "load_adapter"]

register(CAFTConfig, CAFTModel)
