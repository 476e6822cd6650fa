"""`ObjectiveConfig`: the settings of the objective of concept-aware fine-tuning, whatever it trains."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from .checks import require_choice, require_token_fraction
from .heads_config import DEFAULT_NUM_HEADS, HEAD_INPUTS, HEAD_TYPES
from .schedule import SCHEDULES

TRAIN_HEADS = ("frozen", "lora", "full")


@dataclass
class ObjectiveConfig:
    """Fields that `CAFTConfig` and `FullFineTuningConfig` share; the objective is given there."""

    heads: str | None = field(
        default=None,
        metadata={"help": "Hub repository id or local folder of pretrained auxiliary heads; None makes fresh ones."},
    )
    heads_revision: str | None = field(default=None, metadata={"help": "Git revision of the heads on the Hub."})
    heads_commit: str | None = field(
        default=None,
        metadata={
            "help": "Set when heads are loaded from the Hub: the commit they came from. A record, never an input."
        },
    )
    num_auxiliary_heads: int = field(
        default=DEFAULT_NUM_HEADS,
        metadata={
            "help": "Number of auxiliary heads, n - 1: they predict 2 ... n tokens ahead. With pretrained heads at "
            "most what they hold; fewer takes the first ones."
        },
    )
    head_type: Literal["residual", "decoder_layer"] = field(
        default="decoder_layer",
        metadata={"help": "Fresh heads only: x + SiLU(W x), or a copy of the base model's last decoder layer."},
    )
    head_num_layers: int = field(default=1, metadata={"help": "Fresh heads only: blocks or layers per head."})
    head_input: Literal["last_layer_input", "last_hidden_state"] = field(
        default="last_layer_input",
        metadata={"help": "Fresh heads only: what a head reads, before the last layer or after the final norm."},
    )
    aux_loss_weight: float = field(default=0.01, metadata={"help": "beta: weight of all auxiliary losses together."})
    aux_loss_decay: float = field(default=0.8, metadata={"help": "alpha: head k weighs alpha^(k-1)."})
    aux_loss_schedule: Literal["reflected_sine", "sine", "linear", "linear_decay", "constant"] = field(
        default="reflected_sine", metadata={"help": "gamma: course of the auxiliary weight over the run."}
    )
    total_steps: int | None = field(
        default=None,
        metadata={
            "help": "S: optimizer steps of the run, for loops without CAFTCallback. Unless `set_training_progress` "
            "is called, every training forward then counts as one step."
        },
    )
    train_heads: Literal["frozen", "lora", "full"] = field(
        default="frozen", metadata={"help": "Whether the heads only carry gradient, get LoRA themselves, or train."}
    )
    aux_token_fraction: float = field(
        default=1.0,
        metadata={"help": "p: share of the positions, drawn anew each step, that the heads see; weighted by 1/p."},
    )

    def require_valid_objective(self) -> None:
        """Raise a ValueError that names the first of these fields that is out of range."""
        if self.heads is not None:
            self.heads = os.fspath(self.heads)  # a Path would not go into JSON
        require_choice("head_type", self.head_type, HEAD_TYPES)
        require_choice("head_input", self.head_input, HEAD_INPUTS)
        require_choice("aux_loss_schedule", self.aux_loss_schedule, tuple(SCHEDULES))
        require_choice("train_heads", self.train_heads, TRAIN_HEADS)
        self._require_at_least_one("num_auxiliary_heads", " (n = num_auxiliary_heads + 1, so n >= 2)")
        self._require_at_least_one("head_num_layers")
        if self.total_steps is not None:
            self._require_at_least_one("total_steps")
        if not 0 <= self.aux_loss_weight < math.inf:
            raise ValueError(
                f"aux_loss_weight (beta): got {self.aux_loss_weight}, expected 0 (plain LoRA) or more, and finite."
            )
        if not 0 < self.aux_loss_decay <= 1:
            raise ValueError(f"aux_loss_decay (alpha): got {self.aux_loss_decay}, expected 0 < alpha <= 1.")
        require_token_fraction(self.aux_token_fraction, " To switch the auxiliary loss off, set aux_loss_weight=0.")

    def _require_at_least_one(self, name: str, note: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1{note}.")
