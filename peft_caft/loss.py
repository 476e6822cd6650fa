"""The auxiliary loss of CAFT: sum over heads of alpha^(k-1) * CE_k (arXiv 2506.07833, equation of the objective)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone, Captured
from .heads import AuxiliaryHeads
from .linear_cross_entropy import linear_cross_entropy
from .soft_cross_entropy import soft_cross_entropy
from .targets import sample_rows, supervised_rows


@dataclass
class AuxiliaryLoss:
    """Per-head sums of cross entropy; ``sums[i]`` belongs to the head that predicts i + 2 tokens ahead.

    Attributes:
        sums: one fp32 scalar per head, nats, differentiable; estimates of the full sum when positions are sampled.
        counts: number of positions that each sum is about (before sampling).
    """

    sums: list[Tensor]
    counts: list[int]

    def weighted(self, decay: float) -> Tensor:
        """sum_k alpha^(k-1) * (sum of head k's cross entropies), not yet divided by a number of tokens."""
        total = self.sums[0] * decay
        for index, head_sum in enumerate(self.sums[1:], start=1):
            total = total + head_sum * decay ** (index + 1)
        return total


def auxiliary_loss(
    heads: AuxiliaryHeads,
    backbone: Backbone,
    captured: Captured,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    fraction: float = 1.0,
    sampling_seed: int = 0,
) -> AuxiliaryLoss:
    """Cross entropies of all heads on one batch.

    Only rows with a target reach a residual head and the unembedding; a decoder-layer head needs the whole sequence
    as context.

    Args:
        heads: the auxiliary heads.
        backbone: of the base model that made ``captured``.
        captured: hidden states ``(batch, tokens, hidden)``.
        labels: int64 ``(batch, tokens)``, unshifted, -100 where unsupervised.
        attention_mask, position_ids: as the model got them, see `supervised_rows`.
        fraction: p; with p < 1 each position takes part with probability p and weighs 1/p, which leaves the
            expectation of loss and gradient unchanged.
        sampling_seed: seed of that draw, which no other random number depends on.
    """
    unembedding = backbone.unembedding()
    sums, counts = [], []
    for index in range(len(heads.heads)):
        rows, targets = supervised_rows(labels, index + 2, attention_mask, position_ids)
        counts.append(len(rows))
        if fraction < 1:
            kept = sample_rows(rows, fraction, labels.numel(), sampling_seed)
            rows, targets = rows[kept], targets[kept]
        states = heads.states(index, captured, rows, backbone)
        sums.append(linear_cross_entropy(states, targets, unembedding) / fraction)
    return AuxiliaryLoss(sums, counts)


def soft_auxiliary_loss(
    heads: AuxiliaryHeads,
    backbone: Backbone,
    captured: Captured,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    fraction: float = 1.0,
    sampling_seed: int = 0,
) -> AuxiliaryLoss:
    """`auxiliary_loss` with the base model's own distributions as targets, at the same positions (self-distillation).

    Head k at t learns what the base model predicts for token t+k when it has read the tokens up to t+k-1, which the same
    forward pass computed. With ``fraction`` < 1 it is the predicted tokens that are drawn: each needs the base model's
    logits once, for all heads.
    """
    states, teacher_rows, counts = [], [], []
    for index in range(len(heads.heads)):
        rows, _ = supervised_rows(labels, index + 2, attention_mask, position_ids)
        counts.append(len(rows))
        teachers = rows + index + 1  # of the same sequence, since t+k is
        if fraction < 1:
            kept = sample_rows(teachers, fraction, labels.numel(), sampling_seed)
            rows, teachers = rows[kept], teachers[kept]
        states.append(heads.states(index, captured, rows, backbone))
        teacher_rows.append(teachers)
    needed, matched = torch.cat(teacher_rows).unique(return_inverse=True)
    teacher_states = captured.last_hidden_state.flatten(0, 1)[needed]
    picked = list(matched.split([len(rows) for rows in teacher_rows]))
    sums = soft_cross_entropy(states, picked, teacher_states, backbone.unembedding())
    return AuxiliaryLoss([head_sum / fraction for head_sum in sums], counts)
