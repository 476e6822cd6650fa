"""Cross entropy and accuracy of auxiliary heads on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .backbone import Backbone
from .heads import AuxiliaryHeads
from .linear_cross_entropy import CHUNK_ELEMENTS
from .targets import supervised_rows

TOP = 5


@dataclass
class HeadMetrics:
    """How well one head predicts.

    Attributes:
        tokens_ahead: k.
        cross_entropy: mean, nats per token.
        top1, top5: fraction of targets that are the most likely token, or among the five most likely.
        tokens: number of targets.
    """

    tokens_ahead: int
    cross_entropy: float
    top1: float
    top5: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def evaluate_heads(
    heads: AuxiliaryHeads,
    model: nn.Module,
    rows: list[dict[str, list[int]]],
    collate: Callable,
    batch_size: int = 8,
    description: str = "Evaluating heads",
) -> list[HeadMetrics]:
    """Metrics of every head over all supervised positions of ``rows``.

    Args:
        heads: the heads.
        model: the base model they belong to.
        rows: as `peft_caft.data.encode` gives them.
        collate: makes a batch of tensors ``(batch, tokens)`` of some rows.
        batch_size: rows per forward pass.
        description: of the progress bar.
    """
    backbone = Backbone.of(model)
    was_training = heads.training
    heads.eval()
    device = backbone.lm_head.weight.device
    totals = torch.zeros(len(heads.heads), 4, dtype=torch.float64)
    for batch in tqdm(
        DataLoader(rows, batch_size=batch_size, collate_fn=collate), desc=description, unit=" batches", leave=False
    ):
        batch = batch.to(device)
        with backbone.capture() as records:
            backbone.trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for index in range(len(heads.heads)):
            positions, targets = supervised_rows(batch["labels"], index + 2, batch["attention_mask"])
            states = heads.states(index, records[-1], positions, backbone)
            totals[index] += _sums(states, targets, backbone)
    heads.train(was_training)
    means = totals / totals[:, 3:].clamp_min(1)
    return [
        HeadMetrics(index + 2, float(mean[0]), float(mean[1]), float(mean[2]), int(total[3]))
        for index, (mean, total) in enumerate(zip(means, totals, strict=True))
    ]


def _sums(states: torch.Tensor, targets: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """Sum of cross entropies, top-1 hits, top-5 hits, and count, float64 ``(4,)``, over ``(rows, hidden)`` states."""
    unembedding = backbone.unembedding()
    sums = torch.zeros(4, dtype=torch.float64)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // backbone.vocab_size)
    for start in range(0, len(targets), rows_per_chunk):
        logits = unembedding.logits(states[start : start + rows_per_chunk].to(unembedding.weight.dtype))
        target = targets[start : start + rows_per_chunk]
        hits = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == target[:, None]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        sums += torch.tensor([float(loss), float(hits[:, 0].sum()), float(hits.sum()), float(len(target))]).double()
    return sums
