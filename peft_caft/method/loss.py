"""The auxiliary loss of CAFT (arXiv 2506.07833): sum over heads of alpha^(k-1) * CE_k."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.sharding import is_sharded
from ..heads.unembedding import chunk_size_on
from ..heads.watched_pass import Captured
from .linear_cross_entropy import as_scalar, linear_cross_entropy, plain_cross_entropy, split_factor
from .targets import Supervision


@dataclass
class AuxiliaryLoss:
    """The auxiliary loss of one batch, and its parts.

    Attributes:
        total: weight * sum_k alpha^(k-1) * (sum of head k's cross entropies); scalar, fp32, nats.
        sums: ``sums[i]`` is the sum of cross entropies of the head for i + 2 tokens ahead, an fp32
            scalar without graph, nats; an estimate after a draw.
        counts: number of supervised positions of each head, before any draw.
    """

    total: Tensor
    sums: list[Tensor]
    counts: list[int]


@torch.compiler.disable
def auxiliary_loss(
    heads: AuxiliaryHeads,
    backbone: Backbone,
    captured: Captured,
    supervision: Supervision,
    *,
    decay: float,
    weight: Tensor | float = 1.0,
    fast_paths: bool = True,
) -> AuxiliaryLoss:
    """Cross entropies of all heads on one batch.

    Frozen heads are differentiated here, one after the other, so that only the gradients of their
    input and of a trained final norm or unembedding are kept.

    Args:
        heads: the auxiliary heads.
        backbone: parts of the base model that made ``captured``.
        captured: record of a forward pass over ``(batch, tokens)``.
        supervision: targets of the same batch.
        decay: alpha.
        weight: factor of the sum, fp32 scalar: beta * gamma over the number of next-token targets.
        fast_paths: False computes the same plainly; see `AuxiliaryObjective.fast_paths_enabled`.
    """
    unembedding = backbone.unembedding(captured)
    cross_entropy = linear_cross_entropy if fast_paths else plain_cross_entropy
    hidden: Tensor = getattr(captured, heads.config.head_input)
    weight, power_of_two = split_factor(as_scalar(weight, hidden.device))
    at_once = fast_paths and _can_be_differentiated_at_once(heads, captured, hidden)
    shared = [*unembedding.trained, *_trained_norm(heads, backbone)]
    if at_once:
        leaf = hidden.detach().requires_grad_()
        captured = replace(captured, **{heads.config.head_input: leaf})
    supervised = [head.to(hidden.device) for head in supervision.heads]
    sizes = [len(head.rows) for head in supervised]
    sums: list[Tensor] = []
    grads: list[Tensor] = []
    total = hidden.new_zeros((), dtype=unembedding.logits_dtype)
    for group in _computed_together(heads, sizes, unembedding.weight):
        own = [(i, supervised[i]) for i in group]
        states = torch.cat([heads.states(i, captured, s.rows, backbone, fast_paths, s.most) for i, s in own])
        targets = torch.cat([s.targets for _, s in own])
        weights = torch.cat([(weight * (decay ** (i + 1) / supervision.fraction)).expand(sizes[i]) for i in group])
        loss, losses = cross_entropy(states, targets, unembedding, weights)
        sums += [part.sum() / supervision.fraction for part in losses.split([sizes[i] for i in group])]
        if at_once:
            more = torch.autograd.grad(loss, [leaf, *shared])
            grads = [grad.add_(new) for grad, new in zip(grads, more, strict=True)] if grads else [*more]
            loss = loss.detach()
        total = total + loss
    total = _Differentiated.apply(total, grads, hidden, *shared) if at_once else total
    return AuxiliaryLoss(total * power_of_two, sums, [head.count for head in supervised])


def _computed_together(heads: AuxiliaryHeads, sizes: Sequence[int], weight: Tensor) -> list[list[int]]:
    """Indices of heads: decoder layers one by one, residual heads until they fill two chunks."""
    groups: list[list[int]] = []
    together = 2 * chunk_size_on(weight.device).enough(weight.shape[0]) if heads.config.head_type == "residual" else 0
    for index in range(len(sizes)):
        if groups and sum(sizes[i] for i in groups[-1]) < together:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _can_be_differentiated_at_once(heads: AuxiliaryHeads, captured: Captured, hidden: Tensor) -> bool:
    """Whether the heads and the arguments of their layers are constants, and ``hidden`` is not."""
    if is_sharded(heads):  # which needs whole backward passes
        return False
    others = [*heads.parameters(), *_tensors_in((captured.layer_args, captured.layer_kwargs))]
    return torch.is_grad_enabled() and hidden.requires_grad and not any(tensor.requires_grad for tensor in others)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors at any depth; keys and values of an earlier layer come in a UserDict (Gemma 4)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)


def _trained_norm(heads: AuxiliaryHeads, backbone: Backbone) -> list[Tensor]:
    """Parameters of the final norm that get a gradient through the heads."""
    if not heads.config.final_norm or backbone.final_norm is None:
        return []
    return [parameter for parameter in backbone.final_norm.parameters() if parameter.requires_grad]


class _Differentiated(torch.autograd.Function):
    """Returns ``total``, whose gradients ``grads`` in ``inputs`` are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        # A 0-dim factor does not change the dtype.
        return None, None, *(grad * grad_total for grad in ctx.saved_tensors)
