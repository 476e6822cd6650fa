"""`ObjectiveConfig`: settings of CAFT's objective. It imports no torch, for the command line."""

import math
import os
from dataclasses import dataclass
from typing import Literal

from ..basics.checks import (
    require_at_least_one,
    require_choices,
    require_counts,
    require_decay,
    require_token_fraction,
    require_types,
)
from ..basics.settings import OBJECTIVE, setting
from ..heads.config import DEFAULT_NUM_HEADS, HeadInput, HeadType, require_number_of_blocks
from .schedule import Schedule


@dataclass
class ObjectiveConfig:
    """Fields that `CAFTConfig` and `FullFineTuningConfig` share; `CAFTConfig` has the equation."""

    heads: str | None = setting(
        "Pretrained auxiliary heads: Hub id or folder; fresh ones are made where none are given.",
        None,
        group=OBJECTIVE,
    )
    heads_revision: str | None = setting("Branch, tag or commit of the heads on the Hub.", None, group=OBJECTIVE)
    heads_commit: str | None = setting(
        "Set when heads are loaded from the Hub: the commit they came from. A record, never an input.",
        None,
        group=OBJECTIVE,
    )
    num_auxiliary_heads: int = setting(
        "Number of auxiliary heads, n - 1: they predict 2 ... n tokens ahead. With pretrained heads at "
        "most what they hold; fewer takes the first ones.",
        DEFAULT_NUM_HEADS,
        group=OBJECTIVE,
    )
    head_type: HeadType = setting(
        "Fresh heads only: x + SiLU(W x), or a copy of the base model's last decoder layer.",
        "decoder_layer",
        group=OBJECTIVE,
    )
    head_num_layers: int = setting("Fresh heads only: blocks or layers per head.", 1, group=OBJECTIVE)
    head_input: HeadInput = setting(
        "Fresh heads only: what a head reads, before the last layer or after the final norm.",
        "last_layer_input",
        group=OBJECTIVE,
    )
    aux_loss_weight: float = setting("beta: weight of all auxiliary losses together.", 0.01, group=OBJECTIVE)
    aux_loss_decay: float = setting("alpha: head k weighs alpha^(k-1).", 0.8, group=OBJECTIVE)
    aux_loss_schedule: Schedule = setting(
        "gamma: course of the auxiliary weight over the run.", "reflected_sine", group=OBJECTIVE
    )
    total_steps: int | None = setting(
        "S: optimizer steps of the run, for loops without CAFTCallback. Unless `set_training_progress` "
        "is called, every training forward then counts as one step.",
        None,
        group=OBJECTIVE,
    )
    train_heads: Literal["frozen", "lora", "full"] = setting(
        "Whether the heads only carry gradient, get LoRA themselves, or train.", "frozen", group=OBJECTIVE
    )
    aux_token_fraction: float = setting(
        "p: share of the positions, drawn anew each step, that the heads see; weighted by 1/p.", 1.0, group=OBJECTIVE
    )

    def require_valid_objective(self) -> None:
        """Raise a ValueError that names the first of these fields that is out of range."""
        if isinstance(self.heads, os.PathLike):
            self.heads = os.fspath(self.heads)  # JSON has no Path
        require_choices(self, ObjectiveConfig)
        require_at_least_one(
            "num_auxiliary_heads", self.num_auxiliary_heads, " (n = num_auxiliary_heads + 1, so n >= 2)"
        )
        require_counts(self, "head_num_layers", "total_steps")
        require_types(self, ObjectiveConfig)
        require_number_of_blocks("num_auxiliary_heads", self.num_auxiliary_heads, self.head_num_layers)
        if not 0 <= self.aux_loss_weight < math.inf:
            raise ValueError(
                f"aux_loss_weight (beta): got {self.aux_loss_weight}, expected 0 (plain LoRA) or more, and finite."
            )
        require_decay(self.aux_loss_decay)
        require_token_fraction(self.aux_token_fraction, " To switch the auxiliary loss off, set aux_loss_weight=0.")
