"""The objective of CAFT, written as plainly as the equation: full logits, a shift by k, and torch's cross entropy.

    L = CE_1 + beta * gamma * sum_{k=2..n} alpha^(k-1) * CE_k

It shares no code with the package. Hidden states come from ``output_hidden_states``; a decoder-layer head is called with
the arguments that the base model called its last layer with, recorded here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reference_loss(
    model,
    heads,
    labels: Tensor,
    *,
    beta: float,
    gamma: float,
    alpha: float,
    divisor: float | None = None,
    mask: Tensor | None = None,
    **inputs,
) -> Tensor:
    """``model`` is the bare (adapted) transformers model, ``heads`` the list of head modules in order of k = 2, 3, ...

    ``mask``, bool ``(n + 1, batch, tokens)`` or None: ``mask[k, b, t]`` allows head k a target at t.
    """
    divisor = divisor or (labels[:, 1:] != -100).sum()
    own_logits, head_logits = all_logits(model, heads, **inputs)
    total = shifted_cross_entropy(own_logits, labels, 1) / divisor
    for k, logits in enumerate(head_logits, start=2):
        targets = labels if mask is None else labels_where(labels, mask[k], k)
        total = total + beta * gamma * alpha ** (k - 1) * shifted_cross_entropy(logits, targets, k) / divisor
    return total


def all_logits(model, heads, head_input: str = "last_layer_input", **inputs) -> tuple[Tensor, list[Tensor]]:
    """The model's own logits and those of every head, ``(batch, tokens, vocabulary)``, with graph."""
    trunk = model.get_decoder()
    layers = trunk.h if hasattr(trunk, "h") else trunk.layers
    norm = trunk.ln_f if hasattr(trunk, "ln_f") else trunk.norm
    calls = []
    hook = layers[-1].register_forward_pre_hook(lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True)
    outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    x = outputs.hidden_states[-2] if head_input == "last_layer_input" else outputs.hidden_states[-1]

    def unembed(states: Tensor) -> Tensor:
        logits = nn.functional.linear(states, model.lm_head.weight, model.lm_head.bias)
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    head_logits = []
    for head in heads:
        states = x
        for block in head:
            if hasattr(block, "linear"):
                states = states + nn.functional.silu(block.linear(states))
            else:
                states = block(states, *args[1:], **kwargs)
                states = states if isinstance(states, Tensor) else states[0]
        head_logits.append(unembed(norm(states) if head_input == "last_layer_input" else states))
    return outputs.logits, head_logits


def shifted_cross_entropy(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum over positions of the cross entropy at t against the label at t + k."""
    if labels.shape[1] <= k:
        return logits.sum() * 0
    return nn.functional.cross_entropy(
        logits[:, :-k].flatten(0, 1).float(), labels[:, k:].flatten(), ignore_index=-100, reduction="sum"
    )


def labels_where(labels: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Labels at t + k are dropped where head k may not predict from t."""
    kept = labels.clone()
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - k):
            if not allowed[b, t]:
                kept[b, t + k] = -100
    return kept
