"""Cross entropy of a frozen linear layer's logits, in chunks of rows, without ever holding all logits.

Since the layer is frozen, the only gradient is dL/dhidden, and the forward pass, which has the logits of a chunk in
hand, computes it there: memory is one chunk of logits plus dL/dhidden. In plain torch, the same is

    logits = scale(hidden @ weight.T + bias)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .unembedding import Unembedding, chunk_rows, chunks


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropies between ``unembedding.logits(hidden)`` and ``targets``, and their sum.

    Args:
        hidden: ``(rows, hidden)``, any floating dtype; computed in the dtype of the weight or of autocast.
        targets: int64 ``(rows,)``, all of them valid token ids.
        unembedding: the frozen layer.
        weights: fp32 ``(rows,)``, factor of each row in the sum; all 1 if None. In half precision best about 1 in size (see
            `split_factor`): they are applied before dL/dlogits is rounded.

    Returns:
        sum over rows of weight * cross entropy, scalar, differentiable in ``hidden``, 0 for no rows; and the cross entropies
        themselves, ``(rows,)``, without graph. Both in nats, fp32 (float64 for a float64 layer).
    """
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    return _LinearCrossEntropy.apply(hidden, targets, unembedding, weights, needs_grad)[:2]


def split_factor(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``factor``, fp32 scalar, as a product of a number in [1/2, 1), or 0, and a power of two.

    A gradient that is multiplied by the first before it is rounded to half precision, and by the second afterwards, is rounded
    once, and neither overflows nor vanishes on the way.
    """
    mantissa, exponent = torch.frexp(factor)
    return mantissa, torch.ldexp(torch.ones_like(mantissa), exponent)


def plain_cross_entropy(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` as one would write it, with all logits at once: what the chunks are compared with."""
    logits = unembedding.logits(hidden.to(unembedding.weight.dtype))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None, needs_grad: bool
    ) -> Any:
        layer = unembedding.in_compute_dtype(hidden.device.type)
        half = layer.weight.dtype != layer.logits_dtype
        losses = torch.empty(len(targets), dtype=layer.logits_dtype, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            size = chunk_rows(len(targets), layer.weight)
            workspace = layer.workspace(size)
            for chunk in chunks(len(targets), size):
                target = targets[chunk, None]
                # One buffer becomes log-probabilities, probabilities and dL/dlogits in turn.
                log_probs, logits = layer.log_probs(hidden[chunk].to(layer.weight.dtype), workspace)
                target_log_probs = log_probs.gather(1, target)
                torch.neg(target_log_probs[:, 0], out=losses[chunk])
                if grad is not None:
                    grad_logits = log_probs.exp_().scatter_add_(1, target, torch.full_like(target_log_probs, -1.0))
                    if half and weights is not None:
                        grad_logits *= weights[chunk, None]
                    grad[chunk] = layer.backward(grad_logits, logits)
        if grad is not None and weights is not None and not half:
            grad *= weights[:, None]  # much less to do than above, and exact enough
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses if weights is None else losses * weights).sum(), losses, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None  # a 0-dim factor does not change the dtype
