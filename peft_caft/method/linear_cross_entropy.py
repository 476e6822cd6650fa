"""Cross entropy of a linear layer's logits, a chunk of rows at a time.

The forward pass computes dL/dhidden as soon as it has the logits of a chunk, and the gradient of
the layer if that is trained, so that memory holds one chunk of logits beside these. In plain torch:

    logits = scale(hidden @ weight.T + bias)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
"""

from typing import Any

import torch
from torch import Tensor

from ..heads.unembedding import Unembedding, chunk_rows, chunks


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropies between ``unembedding.logits(hidden)`` and ``targets``, and their sum.

    Args:
        hidden: ``(rows, hidden)``, any floating dtype; logits are computed in the dtype of the
            weight or of autocast.
        targets: int64 ``(rows,)``, all of them valid token ids.
        unembedding: the layer; its weight and bias are constants unless they require a gradient.
        weights: fp32 ``(rows,)``, factor of each row in the sum; all 1 if None. In half precision
            they should be about 1 in size (see `split_factor`).

    Returns:
        sum over rows of weight * cross entropy, scalar, differentiable in ``hidden`` and the layer,
        0 for no rows; and the cross entropies themselves, ``(rows,)``, without graph. Both in nats,
        fp32 (float64 for a float64 layer).
    """
    grad_enabled = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, targets, unembedding, weights, grad_enabled, *unembedding.trained)[:2]


def as_scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """``value`` as fp32 scalar on a device; ``torch.tensor`` would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


def split_factor(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 scalar into a number in [1/2, 1), or 0, and a power of two: fp32 scalars.

    A gradient that is multiplied by the first before it is rounded to half precision, and by the
    second afterwards, is rounded once, and neither overflows nor vanishes on the way.
    """
    mantissa, exponent = torch.frexp(factor)
    return mantissa, torch.ldexp(torch.ones_like(mantissa), exponent)


def plain_cross_entropy(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` written plainly, with all logits ``(rows, vocabulary)`` at once.

    Arguments and results are the same, but gradients come from autograd.
    """
    logits = unembedding.logits(hidden.to(unembedding.weight.dtype))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses if weights is None else losses * weights).sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        unembedding: Unembedding,
        weights: Tensor | None,
        grad_enabled: bool,
        *trained: Tensor,
    ) -> Any:
        layer = unembedding.in_compute_dtype(hidden.device.type)
        half = layer.weight.dtype != layer.logits_dtype
        losses = torch.empty(len(targets), dtype=layer.logits_dtype, device=hidden.device)
        needs_grad = [grad_enabled and tensor.requires_grad for tensor in (hidden, *trained)]
        grad = torch.empty_like(hidden) if any(needs_grad) else None
        layer_grad = _LayerGradient(layer) if any(needs_grad[1:]) else None

        def compute(chunk: slice, workspace: Tensor) -> None:
            # A function, so that what is made here is freed before the next chunk.
            states, target = hidden[chunk].to(layer.weight.dtype), targets[chunk, None]
            # One buffer becomes log-probabilities, probabilities and dL/dlogits in turn.
            log_probs, logits = layer.log_probs(states, workspace)
            target_log_probs = log_probs.gather(1, target)
            torch.neg(target_log_probs[:, 0], out=losses[chunk])
            if grad is None:
                return
            grad_logits = log_probs.exp_().scatter_add_(1, target, torch.full_like(target_log_probs, -1.0))
            if half and weights is not None:
                grad_logits *= weights[chunk, None]
            grad[chunk], grad_linear = layer.backward(grad_logits, logits)
            if layer_grad is not None:
                layer_grad.add(grad_linear, states, None if half or weights is None else weights[chunk, None])

        with torch.autocast(hidden.device.type, enabled=False):
            size = chunk_rows(len(targets), layer.weight)
            workspace = layer.workspace(size)
            for chunk in chunks(len(targets), size):
                compute(chunk, workspace)
        if grad is not None and weights is not None and not half:
            grad *= weights[:, None]  # much less to do than above, and exact enough
        layer_grads = [] if layer_grad is None else layer_grad.of(unembedding)
        ctx.save_for_backward(grad, *layer_grads)
        ctx.mark_non_differentiable(losses)
        return (losses if weights is None else losses * weights).sum(), losses, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> Any:
        grad, *layer_grads = ctx.saved_tensors
        # A 0-dim factor does not change the dtype.
        return grad * grad_loss, None, None, None, None, *(layer_grad * grad_loss for layer_grad in layer_grads)


class _LayerGradient:
    """dL/dweight ``(vocabulary, hidden)`` and dL/dbias ``(vocabulary,)``, summed over chunks.

    The sums are in `Unembedding.logits_dtype`.
    """

    def __init__(self, layer: Unembedding) -> None:
        self.weight = torch.zeros_like(layer.weight, dtype=layer.logits_dtype)
        self.bias = None if layer.bias is None else torch.zeros_like(layer.bias, dtype=layer.logits_dtype)

    def add(self, grad_linear: Tensor, states: Tensor, weights: Tensor | None) -> None:
        """Add a chunk.

        Args:
            grad_linear: dL/dlogits before scale and cap, ``(rows, vocabulary)``.
            states: ``(rows, hidden)`` in the same dtype.
            weights: factors of the rows, fp32 ``(rows, 1)``, or None.
        """
        if weights is not None:
            grad_linear = grad_linear * weights
        if grad_linear.dtype == self.weight.dtype:
            self.weight.addmm_(grad_linear.T, states)
        else:
            self.weight += grad_linear.T @ states
        if self.bias is not None:
            self.bias += grad_linear.sum(0, dtype=self.bias.dtype)

    def of(self, unembedding: Unembedding) -> list[Tensor]:
        """Gradients of ``unembedding.trained``, in that order and in its dtype."""
        pairs = ((unembedding.weight, self.weight), (unembedding.bias, self.bias))
        return [
            grad.to(own.dtype) for own, grad in pairs if own is not None and grad is not None and own.requires_grad
        ]
