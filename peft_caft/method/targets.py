"""Which positions supervise which head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


def supervised_rows(
    labels: Tensor, tokens_ahead: int, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions that have a target ``tokens_ahead`` = k tokens ahead, and the targets.

    Position t has one if label[t+k] is set, neither t nor t+k is padding, and both belong to one
    document: their ``position_ids``, which packed batches restart, differ by k.

    Args:
        labels: int64 ``(batch, tokens)``, unshifted, -100 where unsupervised.
        tokens_ahead: k >= 1; k = 1 gives the model's own next-token targets.
        attention_mask: ``(batch, tokens)``, 0 for padding; masks of other shapes are ignored.
        position_ids: int64 ``(batch, tokens)`` or ``(1, tokens)``.

    Returns:
        rows, int64 ``(supervised,)``, ascending indices into the flattened ``batch * tokens``
        positions, and the target token ids, int64 ``(supervised,)``.
    """
    tokens = labels.shape[1]
    targets = labels[:, tokens_ahead:]
    valid = targets != IGNORE_INDEX
    if attention_mask is not None and attention_mask.shape == labels.shape:
        attended = attention_mask.to(labels.device) != 0
        valid = valid & attended[:, tokens_ahead:] & attended[:, :-tokens_ahead]
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == tokens:
        position_ids = position_ids.to(labels.device)
        valid = valid & (position_ids[:, tokens_ahead:] - position_ids[:, :-tokens_ahead] == tokens_ahead)
    batch_index, token_index = valid.nonzero(as_tuple=True)
    return batch_index * tokens + token_index, targets[batch_index, token_index]


def supervised_count(labels: Tensor) -> Tensor:
    """Number of next-token targets, int64 scalar, of labels ``(batch, tokens)``."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()  # no position is before the first label


@dataclass(frozen=True)
class Supervision:
    """Which positions of a batch supervise the auxiliary heads.

    Attributes:
        labels, attention_mask, position_ids: arguments of `supervised_rows`.
        fraction: p in (0, 1]. Each position takes part with probability p and weighs 1/p, which
            leaves the expectation of loss and gradient unchanged.
        seed: seed of that draw.
    """

    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    fraction: float = 1.0
    seed: int = 0

    def drawn_rows(self, tokens_ahead: int, drawn_at: int = 0) -> tuple[Tensor, Tensor, int]:
        """The `supervised_rows` whose positions are drawn.

        The draw is over all positions, on the CPU, so that all heads and all devices draw the same.

        Args:
            tokens_ahead: k >= 1.
            drawn_at: a row is kept if the position so many tokens after it is drawn.

        Returns:
            rows and targets, int64 ``(drawn,)``, and the number of rows before the draw.
        """
        rows, targets = supervised_rows(self.labels, tokens_ahead, self.attention_mask, self.position_ids)
        count = len(rows)
        if self.fraction < 1:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.rand(self.labels.numel(), generator=generator) < self.fraction
            kept = drawn.to(rows.device)[rows + drawn_at]
            rows, targets = rows[kept], targets[kept]
        return rows, targets, count
