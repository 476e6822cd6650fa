"""What hidden states make of their targets, without gradient: cross entropy, and whether the target is among the most likely tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .unembedding import Unembedding, chunk_rows, chunks


def target_scores(states: Tensor, targets: Tensor, unembedding: Unembedding, top: int = 1) -> tuple[Tensor, Tensor]:
    """Scores of hidden states, a chunk of logits at a time.

    Args:
        states: ``(rows, hidden)``.
        targets: int64 ``(rows,)``.
        unembedding: what makes logits of the states.
        top: how many of the most likely tokens to compare with; at most the vocabulary.

    Returns:
        cross entropy, fp32 ``(rows,)``, nats; and which of the most likely tokens is the target, the first one first, bool
        ``(rows, top)``.
    """
    top = min(top, len(unembedding.weight))
    cross_entropies = [states.new_zeros(0, dtype=torch.float32)]
    hits = [torch.zeros(0, top, dtype=torch.bool, device=states.device)]
    size = chunk_rows(len(targets), unembedding.weight)
    workspace = unembedding.workspace(size)
    for chunk in chunks(len(targets), size):
        target = targets[chunk, None]
        log_probs, _ = unembedding.log_probs(states[chunk].to(unembedding.weight.dtype), workspace)
        cross_entropies.append(-log_probs.gather(1, target)[:, 0].float())
        hits.append(log_probs.topk(top, dim=1).indices == target)
    return torch.cat(cross_entropies), torch.cat(hits)
