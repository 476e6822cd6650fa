"""How well auxiliary heads predict held-out data: cross entropy, top-1, top-5 and acceptance
length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.unembedding import target_scores
from ..heads.watched_pass import Captured
from ..method.targets import supervised_rows

TOP = 5


@dataclass
class HeadMetrics:
    """How well one head predicts.

    Attributes:
        tokens_ahead: k.
        cross_entropy: mean, nats per token.
        top1, top5: fraction of targets that are the most likely token, or among the five most
            likely.
        tokens: number of targets.
    """

    tokens_ahead: int
    cross_entropy: float
    top1: float
    top5: float
    tokens: int


@dataclass
class HeadEvaluation:
    """How well all heads of one base model predict.

    Attributes:
        heads: one entry per head.
        acceptance_length: mean number of consecutive heads, from k = 2 on, whose most likely token
            is the right one, over the positions that have a target for every head; between 0 and n
            - 1.
    """

    heads: list[HeadMetrics]
    acceptance_length: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_totals(cls, totals: Tensor) -> HeadEvaluation:
        """From the sum of `batch_totals` over all batches."""
        means = totals / totals[:, 3:].clamp_min(1)
        heads = [
            HeadMetrics(index + 2, float(mean[0]), float(mean[1]), float(mean[2]), int(total[3]))
            for index, (mean, total) in enumerate(zip(means[:-1], totals, strict=False))
        ]
        return cls(heads, float(means[-1, 0]))

    def weighted_cross_entropy(self, decay: float) -> float:
        """sum_k alpha^(k-1) * CE_k, the objective of stage 1 with hard targets, nats."""
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
        heads: the heads.
        model: the base model they belong to, in evaluation mode.
        rows: as `peft_caft.training.data.encode` gives them.
        collate: makes a batch of tensors ``(batch, tokens)`` of some rows.
        batch_size: rows per forward pass.
        description: of the progress bar.
    """
    backbone = Backbone.of(model)
    was_training = heads.training
    heads.eval()
    batches = tqdm(length_sorted(rows, collate, batch_size), desc=description, unit=" batches", leave=False)
    device = backbone.lm_head.weight.device

    def totals_of(batch: Any) -> Tensor:
        batch = batch.to(device)
        with backbone.capture() as records:
            backbone.trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return batch_totals(heads, backbone, records[-1], batch["labels"], batch["attention_mask"])

    totals = sum_totals(totals_of(batch) for batch in batches)
    heads.train(was_training)
    return HeadEvaluation.from_totals(totals)


def length_sorted(rows: list[dict[str, list[int]]], collate: Callable, batch_size: int) -> DataLoader:
    """Batches of rows of about one length, long ones first, so that little is padding and memory
    runs out at once.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    return DataLoader([rows[index] for index in order], batch_size=batch_size, collate_fn=collate)


def sum_totals(totals: Iterable[Tensor]) -> Tensor:
    """Sum of `batch_totals` over batches; one batch at least."""
    return torch.stack(list(totals)).sum(dim=0)


def batch_totals(
    heads: AuxiliaryHeads, backbone: Backbone, captured: Captured, labels: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Sums over one batch, from which `HeadEvaluation.from_totals` makes means.

    Args:
        heads, backbone, captured: as for `peft_caft.method.loss.auxiliary_loss`.
        labels: int64 ``(batch, tokens)``, -100 where unsupervised.
        attention_mask: ``(batch, tokens)`` or None.

    Returns:
        float64 ``(heads + 1, 4)``: for each head the sums of cross entropies, top-1 hits, top-5
        hits, and the number of targets; in the last row the sum of accepted lengths, two zeros, and
        the number of positions with all targets.
    """
    unembedding = backbone.unembedding(captured)
    exact = torch.float32 if labels.device.type == "mps" else torch.float64  # Apple's devices have no double
    sums = torch.zeros(len(heads.heads) + 1, 4, dtype=exact, device=labels.device)
    accepted = torch.ones(labels.numel(), dtype=torch.bool, device=labels.device)
    lengths = torch.zeros(labels.numel(), device=labels.device)
    has_all = torch.ones_like(accepted)
    for index in range(len(heads.heads)):
        rows, targets = supervised_rows(labels, index + 2, attention_mask)
        cross_entropies, hits = target_scores(heads.states(index, captured, rows, backbone), targets, unembedding, TOP)
        values = (cross_entropies.sum(), hits[:, 0].sum(), hits.sum())
        sums[index] = torch.stack([*(v.to(exact) for v in values), sums.new_tensor(len(rows))])
        hit, has_target = torch.zeros_like(accepted), torch.zeros_like(accepted)
        hit[rows], has_target[rows] = hits[:, 0], True
        accepted &= hit
        has_all &= has_target
        lengths += accepted
    sums[-1, 0], sums[-1, 3] = lengths[has_all].sum(), has_all.sum()
    return sums
