"""`Progress`: where a training run is, and what its auxiliary losses were since they were last read."""

from __future__ import annotations

from dataclasses import dataclass, field

from .loss import AuxiliaryLoss
from .objective_config import ObjectiveConfig
from .recent_losses import RecentLosses
from .schedule import gamma


@dataclass
class Progress:
    """Steps of the run as `CAFTModel.set_training_progress` told them, or counted by forward passes if it never did.

    Attributes:
        computed: forward passes whose auxiliary loss was computed (or is zero by ``aux_loss_weight=0``).
        recent: auxiliary losses since they were last read.
    """

    step: int = 0
    total_steps: int | None = None
    told: bool = False
    forwards_since_told: int = 0
    computed: int = 0
    recent: RecentLosses = field(default_factory=RecentLosses)

    def set(self, step: int, total_steps: int | None) -> None:
        self.step, self.total_steps, self.told = step, total_steps, True
        self.forwards_since_told = 0

    def begin_forward(self, config: ObjectiveConfig) -> None:
        """Count one training forward; without `set` it is taken for one optimizer step.

        Raises:
            ValueError: if the schedule moves and nobody said how long the run is.
        """
        if not self.told:
            if config.total_steps is None and config.aux_loss_schedule != "constant":
                raise ValueError(
                    f"aux_loss_schedule: got {config.aux_loss_schedule!r}, which needs to know how far the run is, but "
                    "total_steps is None and nobody called set_training_progress. Pass callbacks=[CAFTCallback()] to "
                    "the Trainer; in a bare loop call model.set_training_progress(step, total_steps) before each step "
                    "or set CAFTConfig(total_steps=...); or choose aux_loss_schedule='constant'."
                )
            self.step = self.forwards_since_told
        self.forwards_since_told += 1

    def gamma(self, config: ObjectiveConfig) -> float:
        """gamma(s) of the configured schedule."""
        total_steps = config.total_steps if self.total_steps is None else self.total_steps
        if config.aux_loss_schedule == "constant":
            return 1.0
        if total_steps is None:
            raise ValueError(
                f"total_steps: got None, expected the number of optimizer steps of the run, which "
                f"aux_loss_schedule={config.aux_loss_schedule!r} needs. Pass it to set_training_progress(step, "
                "total_steps) or set CAFTConfig(total_steps=...)."
            )
        return gamma(config.aux_loss_schedule, self.step, total_steps)

    def forward_seed(self) -> int:
        """Seed for the sampling of positions: new for every forward pass, the same again after a resume."""
        return self.step * 1_000_003 + self.forwards_since_told

    def auxiliary_loss_computed(self, auxiliary: AuxiliaryLoss | None, supervised: int) -> None:
        self.computed += 1
        if auxiliary is not None:
            self.recent.add(auxiliary, supervised)
