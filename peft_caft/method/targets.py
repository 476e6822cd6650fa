"""Which positions supervise which head."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def supervised_rows(
    labels: Tensor,
    tokens_ahead: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions from which the head for ``tokens_ahead`` = k has a target, and the targets.

    Position t has one where label[t+k] is set and t and t+k belong to one document: their positions
    differ by k where ``position_ids`` are given (packed and padding-free batches restart them), and
    neither is padding.

    Args:
        labels: int64 ``(batch, tokens)``, unshifted, -100 where unsupervised.
        tokens_ahead: k >= 1; k = 1 gives the model's own next-token targets.
        attention_mask: ``(batch, tokens)``, 0 for padding; masks of other shapes say nothing about
            padding here.
        position_ids: int64 ``(batch, tokens)`` or ``(1, tokens)``.

    Returns:
        rows, int64 ``(supervised,)``, indices into the flattened ``batch * tokens`` positions, and
        the target token ids, int64 ``(supervised,)``. Both are empty when no sequence is longer
        than k.
    """
    tokens = labels.shape[1]
    if tokens <= tokens_ahead:
        empty = labels.new_empty(0)
        return empty, empty
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
    """Number of next-token targets, the divisor of CE_1: a label in the first column has no
    position before it.
    """
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def sample_rows(rows: Tensor, fraction: float, positions: int, seed: int) -> Tensor:
    """Which of ``rows`` survive when every position is kept with probability ``fraction``.

    The draw is over positions, on the CPU, so that all heads given the same seed see the same
    positions.

    Args:
        rows: int64 ``(supervised,)``, values below ``positions``.
        fraction: p in (0, 1].
        positions: ``batch * tokens``.
        seed: of the draw, which no other random number depends on.

    Returns:
        bool ``(supervised,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(positions, generator=generator) < fraction
    return kept.to(rows.device)[rows]
