"""`RecentLosses`: the auxiliary losses of the forward passes since they were last logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .loss import AuxiliaryLoss


@dataclass
class RecentLosses:
    """Sums over forward passes, kept on the device until they are read."""

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
        """Losses since the last call, in nats, and forget them; empty if there were none.

        Args:
            decay: alpha.
            reduce: sums a tensor over the processes, all of which then call this; None for the losses of this one alone.

        Returns:
            ``loss_head_k``: mean cross entropy over the positions that supervise head k; ``aux_loss``: sum over heads
            of alpha^(k-1) * CE_k, with CE_k divided by the number of next-token targets as in the training loss.
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
