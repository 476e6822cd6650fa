"""`RecentLosses`, auxiliary losses since the last log, and `Progress`, the step of the run."""

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .loss import AuxiliaryLoss
from .objective_config import ObjectiveConfig
from .schedule import gamma


@dataclass
class RecentLosses:
    """Sums of auxiliary losses over forward passes, kept on the device until they are read."""

    _head_sums: list[Tensor] = field(default_factory=list)
    _head_counts: list[int] = field(default_factory=list)
    _supervised: int = 0

    def add(self, auxiliary: AuxiliaryLoss, supervised: int) -> None:
        """Add one forward pass with ``supervised`` next-token targets."""
        sums = auxiliary.sums
        if len(self._head_sums) != len(sums):
            self._head_sums, self._head_counts, self._supervised = [0.0 * s for s in sums], [0] * len(sums), 0
        self._head_sums = [total + new for total, new in zip(self._head_sums, sums, strict=True)]
        self._head_counts = [total + new for total, new in zip(self._head_counts, auxiliary.counts, strict=True)]
        self._supervised += supervised

    def read(self, decay: float, reduce: Callable[[Tensor], Any] | None = None) -> dict[str, float]:
        """Return and forget the losses since the last call, in nats/token; empty if there are none.

        Args:
            decay: alpha.
            reduce: sums a tensor over the processes, which then call this together, or None.

        Returns:
            ``loss_head_k``: mean cross entropy over the positions that supervise head k;
            ``aux_loss``: sum over heads of alpha^(k-1) * CE_k, with CE_k divided by the number of
            next-token targets as in the training loss.
        """
        if not self._head_sums:
            return {}
        sums = torch.stack(self._head_sums)
        totals = torch.cat([sums, sums.new_tensor([*self._head_counts, self._supervised])])
        self._head_sums, self._head_counts, self._supervised = [], [], 0
        *values, supervised = (totals if reduce is None else reduce(totals)).tolist()
        if not supervised:
            return {}
        head_sums, counts = values[: len(sums)], values[len(sums) :]
        losses = {"aux_loss": sum(s * decay ** (i + 1) for i, s in enumerate(head_sums)) / supervised}
        for index, (head_sum, count) in enumerate(zip(head_sums, counts, strict=True)):
            if count:
                losses[f"loss_head_{index + 2}"] = head_sum / count
        return losses


@dataclass
class Progress:
    """The step of the run, told by `set`, or else counted by forward passes.

    Attributes:
        step: number of optimizer steps done.
        total_steps: that of the run; None takes the configuration's.
        told: whether `set` was ever called.
        forwards_since_told: number of training forwards since then.
        computed: number of them whose auxiliary loss was computed, or is 0 by its weight.
        trained: number of backward passes through such a loss since then.
        recent: auxiliary losses since they were last read.
    """

    step: int = 0
    total_steps: int | None = None
    told: bool = False
    forwards_since_told: int = 0
    computed: int = 0
    trained: int = 0
    recent: RecentLosses = field(default_factory=RecentLosses)
    _watching: bool = True  # until a backward pass has reached a loss, or a warning was given
    _first: weakref.ref | None = None  # of the first loss that is watched

    def set(self, step: int, total_steps: int | None) -> None:
        self.step, self.total_steps, self.told = step, total_steps, True
        self.forwards_since_told = self.computed = self.trained = 0

    def begin_forward(self, config: ObjectiveConfig) -> None:
        """Count one training forward, as one optimizer step if `set` was never called.

        Raises:
            ValueError: if the schedule needs the number of steps and nobody has told it.
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
        if self._watching and self._first is not None and self._first() is None:
            self._watching = False
            warnings.warn(
                "auxiliary loss: computed, but its graph was freed before a backward pass: it trains nothing. It is part of "
                "outputs.loss; take your loss from there, or add outputs.loss to it.",
                stacklevel=2,
            )

    def gamma(self, config: ObjectiveConfig) -> float:
        """gamma(s) of the schedule; a ValueError if it needs a number of steps that nobody told."""
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
        """Seed of the draw of positions: new in each forward pass, but the same after a resume."""
        return self.step * 1_000_003 + self.forwards_since_told

    def nothing_to_train(self) -> None:
        """Count a forward whose auxiliary loss is 0 by its weight."""
        self.computed += 1
        self.trained += 1

    def auxiliary_loss_computed(self, auxiliary: AuxiliaryLoss, supervised: int) -> None:
        """Count a forward and, later, the backward pass through its auxiliary loss."""
        self.computed += 1
        self.recent.add(auxiliary, supervised)
        if not auxiliary.total.requires_grad:
            self.trained += 1
            if self._watching:
                self._watching = False
                warnings.warn(
                    "auxiliary loss: it trains nothing, since no trained parameter has an effect on what the frozen heads read "
                    "(head_input). Adapt a layer before the last one (target_modules, layers_to_transform), train the heads "
                    "(train_heads), or save the time with aux_loss_weight=0.",
                    stacklevel=2,
                )
            return
        watch = _Watch(self)
        auxiliary.total.register_hook(watch)
        if self._first is None:
            self._first = weakref.ref(watch)


class _Watch:
    """Counts a backward pass. Autograd keeps it for as long as that is possible."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, grad: Tensor) -> None:
        self._progress.trained += 1
        self._progress._watching = False
