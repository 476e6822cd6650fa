"""Metrics of auxiliary heads on held-out data: cross entropy, accuracy, acceptance length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.unembedding import target_scores
from ..heads.watched_pass import Captured
from ..method.targets import Supervision

TOP = 5


@dataclass
class HeadMetrics:
    """Metrics of one head.

    Attributes:
        tokens_ahead: k.
        cross_entropy: mean over targets, nats/token.
        top1, top5: fraction of targets that are the most likely token, or one of the five.
        tokens: number of targets.
    """

    tokens_ahead: int
    cross_entropy: float
    top1: float
    top5: float
    tokens: int


@dataclass
class HeadEvaluation:
    """Metrics of all heads.

    Attributes:
        acceptance_length: mean number of consecutive heads, from k = 2 on, whose most likely token
            is the target, between 0 and n - 1; over positions that have a target for every head.
    """

    heads: list[HeadMetrics]
    acceptance_length: float

    @classmethod
    def from_totals(cls, totals: Tensor) -> HeadEvaluation:
        """Make means of the sum of `batch_totals` over all batches, float64 ``(heads + 1, 4)``."""
        means = totals / totals[:, 3:].clamp_min(1)
        heads = [
            HeadMetrics(index + 2, float(mean[0]), float(mean[1]), float(mean[2]), int(total[3]))
            for index, (mean, total) in enumerate(zip(means[:-1], totals, strict=False))
        ]
        return cls(heads, float(means[-1, 0]))

    def weighted_cross_entropy(self, decay: float) -> float:
        """sum_k alpha^(k-1) * CE_k, the objective of stage 1 with hard targets, nats/token."""
        return sum(decay ** (head.tokens_ahead - 1) * head.cross_entropy for head in self.heads)


@torch.no_grad()
def evaluate_heads(
    heads: AuxiliaryHeads,
    model: nn.Module,
    rows: list[dict[str, list[int]]],
    collate: Callable,
    batch_size: int = 8,
    description: str = "Evaluating heads",
) -> HeadEvaluation:
    """Metrics of every head over all supervised positions of ``rows``.

    Args:
        model: the base model, in evaluation mode.
        rows: rows that `peft_caft.training.data.encode` returned.
        collate: function that makes a batch of tensors ``(batch, tokens)`` of rows.
    """
    backbone = Backbone.of(model)
    was_training = heads.training
    heads.eval()
    totals = []
    for batch in tqdm(length_sorted(rows, collate, batch_size), desc=description, unit=" batches", leave=False):
        batch = batch.to(backbone.lm_head.weight.device)
        with backbone.capture() as records:
            backbone.trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        totals.append(batch_totals(heads, backbone, records[-1], batch["labels"], batch["attention_mask"]))
    heads.train(was_training)
    return HeadEvaluation.from_totals(torch.stack(totals).sum(dim=0))


def length_sorted(rows: list[dict[str, list[int]]], collate: Callable, batch_size: int) -> DataLoader:
    """Batches that ``collate`` made, such as int64 ``(batch, tokens)`` under ``input_ids``, longest
    rows first: little padding, and too little memory shows at once.
    """
    longest_first = sorted(rows, key=lambda row: -len(row["input_ids"]))
    return DataLoader(longest_first, batch_size=batch_size, collate_fn=collate)


def batch_totals(
    heads: AuxiliaryHeads, backbone: Backbone, captured: Captured, labels: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Sums over one batch, from which `HeadEvaluation.from_totals` makes means.

    Args:
        captured: record of a forward pass over ``(batch, tokens)``.
        labels: int64 ``(batch, tokens)``, -100 where unsupervised.
        attention_mask: ``(batch, tokens)``, 0 for padding, or None.

    Returns:
        ``(heads + 1, 4)``, float64 on CPU and CUDA, else fp32: for each head the sum of cross
        entropies (nats), top-1 hits, top-5 hits, and the number of targets; in the last row the
        sum of accepted lengths, two zeros, and the number of positions with all targets.
    """
    unembedding = backbone.unembedding(captured)
    # Apple's devices have no double, nor have some of Intel's.
    exact = torch.float64 if labels.device.type in ("cpu", "cuda") else torch.float32
    sums = torch.zeros(len(heads.heads) + 1, 4, dtype=exact, device=labels.device)
    accepted = torch.ones(labels.numel(), dtype=torch.bool, device=labels.device)
    lengths = torch.zeros(labels.numel(), device=labels.device)
    has_all = torch.ones_like(accepted)
    for index, own in enumerate(Supervision.of(labels, len(heads.heads), {"attention_mask": attention_mask}).heads):
        rows, states = own.rows, heads.states(index, captured, own.rows, backbone, most=own.most)
        cross_entropies, hits = target_scores(states, own.targets, unembedding, TOP)
        values = (cross_entropies.sum(), hits[:, 0].sum(), hits.sum())
        sums[index] = torch.stack([*(v.to(exact) for v in values), sums.new_tensor(len(rows))])
        hit, has_target = torch.zeros_like(accepted), torch.zeros_like(accepted)
        hit[rows], has_target[rows] = hits[:, 0], True
        accepted &= hit
        has_all &= has_target
        lengths += accepted
    sums[-1, 0], sums[-1, 3] = lengths[has_all].sum(), has_all.sum()
    return sums
