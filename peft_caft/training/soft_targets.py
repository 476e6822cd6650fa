"""Cross entropy of all heads against the base model's own distributions (self-distillation).

The base model predicts token t+k at position t+k-1 of its own forward pass. One chunk of these
probabilities serves all heads, and, as in `linear_cross_entropy`, gradients are computed at once,
so that no logits are kept. In plain torch, for one head:

    teacher = softmax(scale(teacher_states[rows] @ weight.T + bias))
    loss = -(teacher * log_softmax(scale(states @ weight.T + bias))).sum()
"""

from typing import Any

import torch
from torch import Tensor

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.unembedding import Unembedding, chunk_rows, chunks
from ..heads.watched_pass import Captured
from ..method.loss import AuxiliaryLoss
from ..method.targets import Supervision


def soft_cross_entropy(
    states: list[Tensor], rows: list[Tensor], teacher_states: Tensor, unembedding: Unembedding
) -> list[Tensor]:
    """Cross entropies between each head's and the teacher's distributions, summed over rows.

    Args:
        states: ``(rows_i, hidden)`` of each head, any floating dtype.
        rows: int64 ``(rows_i,)`` of each head, ascending: each state's row of ``teacher_states``.
        teacher_states: final hidden states of the teacher, ``(teacher_rows, hidden)``, a constant.
        unembedding: frozen layer of both sides.

    Returns:
        one scalar per head, fp32 (float64 for a float64 layer), nats, with graph; 0 for no rows.
        Its minimum is the entropy of the teacher, not 0.
    """
    needs_grad = torch.is_grad_enabled() and any(s.requires_grad for s in states)
    return list(
        _SoftCrossEntropy.apply(rows, teacher_states.detach(), unembedding, needs_grad, *states)[: len(states)]
    )


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: list[Tensor],
        teacher_states: Tensor,
        unembedding: Unembedding,
        needs_grad: bool,
        *states: Tensor,
    ) -> Any:
        device = teacher_states.device
        layer = unembedding.in_compute_dtype(device.type)
        dtype = layer.weight.dtype
        losses = torch.zeros(len(states), dtype=layer.logits_dtype, device=device)
        grads = [torch.empty_like(s) if needs_grad else None for s in states]
        with torch.autocast(device.type, enabled=False):
            size = chunk_rows(len(teacher_states), layer.weight)
            teacher_workspace, workspace = layer.workspace(size), layer.workspace(size)
            parts = list(chunks(len(teacher_states), size))
            starts = torch.arange(0, size * (len(parts) + 1), size, device=device)  # the last is past the end
            bounds = torch.stack([torch.searchsorted(head_rows, starts) for head_rows in rows]).tolist()
            for number, chunk in enumerate(parts):
                teacher = layer.log_probs(teacher_states[chunk].to(dtype), teacher_workspace)[0].exp_()
                for head, head_states in enumerate(states):
                    own = slice(bounds[head][number], bounds[head][number + 1])
                    picked = rows[head][own] - chunk.start
                    if not len(picked):
                        continue
                    target = teacher if len(picked) == len(teacher) else teacher[picked]
                    log_probs, logits = layer.log_probs(head_states[own].to(dtype), workspace)
                    losses[head] -= torch.dot(target.flatten(), log_probs.flatten())
                    if (grad := grads[head]) is not None:
                        grad[own], _ = layer.backward(log_probs.exp_().sub_(target), logits)
        ctx.save_for_backward(*grads)
        return *losses.unbind(), None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_losses: Tensor) -> Any:
        grads = (grad * grad_loss for grad, grad_loss in zip(ctx.saved_tensors, grad_losses, strict=False))
        return None, None, None, None, *grads


def soft_auxiliary_loss(
    heads: AuxiliaryHeads,
    backbone: Backbone,
    captured: Captured,
    supervision: Supervision,
    *,
    decay: float,
    weight: Tensor | float = 1.0,
) -> AuxiliaryLoss:
    """`auxiliary_loss` whose targets are the base model's own distributions (self-distillation).

    Head k at t learns what the base model predicts for token t+k after the tokens up to t+k-1. A
    draw is over predicted tokens, for each of which all heads need the same logits of that model.

    Args:
        captured: record of a forward pass over ``(batch, tokens)``.
        supervision: targets of the same batch, drawn with ``draw_predicted``; only positions count.
        decay: alpha.
        weight: factor of the sum, fp32 scalar.
    """
    supervised = [head.to(captured.last_layer_input.device) for head in supervision.heads]
    states = [heads.states(i, captured, own.rows, backbone, most=own.most) for i, own in enumerate(supervised)]
    teacher_rows = [own.rows + i + 1 for i, own in enumerate(supervised)]  # of the same sequence, since t+k is
    needed, matched = torch.cat(teacher_rows).unique(return_inverse=True)
    teacher_states = captured.last_hidden_state.flatten(0, 1)[needed]
    picked = list(matched.split([len(rows) for rows in teacher_rows]))
    unembedding = backbone.unembedding(captured).detached()
    sums = [s / supervision.fraction for s in soft_cross_entropy(states, picked, teacher_states, unembedding)]
    total = sum(head_sum * decay ** (index + 1) for index, head_sum in enumerate(sums))
    return AuxiliaryLoss(total * weight, [head_sum.detach() for head_sum in sums], [own.count for own in supervised])
