"""A Triton kernel for the part of linear cross entropy that is no matrix product; a candidate, which the job `kernel` times.

`peft_caft.method.linear_cross_entropy` goes over a chunk's logits with one torch operation after the other: cast, log-softmax,
exponential, subtraction, factor, cast. This kernel does all of them, a row in each program: it reads the row twice and writes
dL/dlogits in place. It enters the package if it makes the loss more than a tenth faster on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/repository/test_triton_cross_entropy.py   # on a CPU
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_caft.heads.unembedding import Unembedding, chunk_rows, chunks

BLOCK = 4096  # logits that a program holds at a time


@triton.jit
def _shown(logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits after the architecture's factor and soft cap, fp32."""
    scaled = logits.to(tl.float32) * scale
    if HAS_SOFTCAP:
        scaled = softcap * (2 * tl.sigmoid(2 * scaled / softcap) - 1)  # softcap * tanh(scaled / softcap)
    return scaled


@triton.jit
def _loss_and_gradient(
    logits,
    row_stride,
    targets,
    weights,
    losses,
    scale,
    softcap,
    VOCABULARY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * row_stride
    target = tl.load(targets + row)
    offsets = tl.arange(0, BLOCK)
    greatest = float("-inf")
    total = 0.0
    for first in range(0, VOCABULARY, BLOCK):
        inside = first + offsets < VOCABULARY
        shown = _shown(tl.load(own + first + offsets, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
        shown = tl.where(inside, shown, float("-inf"))
        new = tl.maximum(greatest, tl.max(shown, 0))
        total = total * tl.exp(greatest - new) + tl.sum(tl.exp(shown - new), 0)
        greatest = new
    log_sum = greatest + tl.log(total)
    tl.store(losses + row, log_sum - _shown(tl.load(own + target), scale, softcap, HAS_SOFTCAP))
    factor = scale
    if HAS_WEIGHTS:
        factor *= tl.load(weights + row)
    for first in range(0, VOCABULARY, BLOCK):
        inside = first + offsets < VOCABULARY
        shown = _shown(tl.load(own + first + offsets, mask=inside, other=0.0), scale, softcap, HAS_SOFTCAP)
        gradient = tl.exp(shown - log_sum) - (first + offsets == target).to(tl.float32)
        if HAS_SOFTCAP:
            gradient *= 1 - (shown / softcap) * (shown / softcap)
        tl.store(own + first + offsets, (gradient * factor).to(logits.dtype.element_ty), mask=inside)


def losses_and_gradient(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropies of the rows, and the gradient of their weighted sum in ``hidden``; the layer is a constant.

    Args:
        hidden: ``(rows, hidden)`` in the dtype of the weight.
        targets: int64 ``(rows,)``.
        unembedding: the layer, in bf16, fp16 or fp32.
        weights: fp32 ``(rows,)``, all 1 if None.

    Returns:
        fp32 ``(rows,)``, nats, and ``(rows, hidden)`` in the dtype of ``hidden``.
    """
    weight, bias = unembedding.weight, unembedding.bias
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty_like(hidden)
    size = chunk_rows(len(targets), weight)
    workspace = unembedding.workspace(size)
    for chunk in chunks(len(targets), size):
        logits = workspace[: chunk.stop - chunk.start]
        if bias is None:
            torch.mm(hidden[chunk], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[chunk], weight.T, out=logits)
        own_weights = targets if weights is None else weights[chunk]  # any tensor, if there are none
        _loss_and_gradient[(len(logits),)](
            logits,
            logits.stride(0),
            targets[chunk],
            own_weights,
            losses[chunk],
            unembedding.scale,
            unembedding.softcap or 1.0,
            VOCABULARY=logits.shape[1],
            HAS_WEIGHTS=weights is not None,
            HAS_SOFTCAP=unembedding.softcap is not None,
            BLOCK=BLOCK,
        )
        torch.mm(logits, weight, out=gradient[chunk])
    return losses, gradient
