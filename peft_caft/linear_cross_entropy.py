"""Cross entropy of a frozen linear layer's logits, in chunks of rows, without ever holding all logits.

Since the layer is frozen, the only gradient is dL/dhidden, and the forward pass, which has the logits of a chunk in
hand, computes it there: memory is one chunk of logits plus dL/dhidden. In plain torch, the same is

    logits = scale(hidden @ weight.T + bias)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**23  # logits per chunk: 32 MiB in fp32, 170 rows of a 49k vocabulary


def rows_per_chunk(weight: Tensor) -> int:
    """Rows whose logits are computed together by an unembedding of this weight ``(vocabulary, hidden)``."""
    return max(1, CHUNK_ELEMENTS // weight.shape[0])


@dataclass(frozen=True)
class Unembedding:
    """A frozen lm_head and what the architecture does to its logits.

    Attributes:
        weight: ``(vocabulary, hidden)``, without graph.
        bias: ``(vocabulary,)`` or None, without graph.
        scale: factor on the logits.
        softcap: c of ``c * tanh(logits / c)``, applied after the factor, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(rows, vocabulary)``, fp32 or better, of ``(rows, hidden)`` in the dtype of the weight."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def in_compute_dtype(self, device_type: str) -> Unembedding:
        """The same layer in the dtype of autocast, where that is on, for use with autocast switched off."""
        if not torch.is_autocast_enabled(device_type):
            return self
        dtype = torch.get_autocast_dtype(device_type)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Unembedding(self.weight.to(dtype), bias, self.scale, self.softcap)

    def backward(self, grad_logits: Tensor, logits: Tensor) -> Tensor:
        """dL/dhidden ``(rows, hidden)`` from dL/dlogits and the logits, in one dtype; overwrites ``grad_logits``."""
        if self.softcap is not None:
            grad_logits *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            grad_logits *= self.scale
        return grad_logits.to(self.weight.dtype) @ self.weight


def linear_cross_entropy(hidden: Tensor, targets: Tensor, unembedding: Unembedding) -> Tensor:
    """Sum over rows of the cross entropy between ``unembedding.logits(hidden)`` and ``targets``.

    Args:
        hidden: ``(rows, hidden)``, any floating dtype; computed in the dtype of the weight or of autocast.
        targets: int64 ``(rows,)``, all of them valid token ids.
        unembedding: the frozen layer.

    Returns:
        scalar, fp32 (float64 for a float64 layer), differentiable in ``hidden``; 0 for no rows.
    """
    loss, _ = _LinearCrossEntropy.apply(hidden, targets, unembedding, torch.is_grad_enabled() and hidden.requires_grad)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, unembedding: Unembedding, needs_grad: bool) -> Any:
        device = hidden.device.type
        layer = unembedding.in_compute_dtype(device)
        dtype = layer.weight.dtype
        loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        chunk_rows = rows_per_chunk(layer.weight)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_rows):
                chunk = slice(start, start + chunk_rows)
                logits = layer.logits(hidden[chunk].to(dtype))
                target = targets[chunk, None]
                log_probs = logits.log_softmax(dim=1)  # fewer passes over memory than logsumexp takes
                target_log_probs = log_probs.gather(1, target)
                loss -= target_log_probs.sum()
                if grad is not None:
                    grad_logits = log_probs.exp_()
                    grad_logits.scatter_add_(1, target, torch.full_like(target_log_probs, -1.0))
                    grad[chunk] = layer.backward(grad_logits, logits)
        ctx.save_for_backward(grad)
        return loss, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None  # a 0-dim factor does not change the dtype
