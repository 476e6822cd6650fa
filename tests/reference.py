"""The objective of CAFT, written as plainly as the equation: full logits, a shift by k, and torch's cross entropy.

    L = CE_1 + beta * gamma * sum_{k=2..n} alpha^(k-1) * CE_k

It shares no code with the package. What heads read comes from a hook on the last layer and from ``output_hidden_states``; a
decoder-layer head is called with the arguments that the base model called its last layer with. Which modules are layers,
norm and lm_head, and what follows them, is written down by the test for its architecture (`Parts`), and not found out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parts:
    """The base model's own modules, taken from it before PEFT wrapped anything.

    Attributes:
        layers: name of the list of decoder layers.
        norm: between last layer and lm_head.
        lm_head: a linear layer.
        after: what the architecture does to its logits.
    """

    layers: str
    norm: nn.Module
    lm_head: nn.Module
    after: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model) -> Parts:
        """Those of the models in ``tests/support/tiny_models.py``."""
        gpt2 = hasattr(model, "transformer")
        cap = getattr(model.config, "final_logit_softcapping", None)
        return cls(
            layers="transformer.h" if gpt2 else "model.layers",
            norm=model.transformer.ln_f if gpt2 else model.model.norm,
            lm_head=model.lm_head,
            after=lambda logits: logits if cap is None else cap * torch.tanh(logits / cap),
        )


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
    fraction: float = 1.0,
    **inputs,
) -> Tensor:
    """``model`` is the bare (adapted) transformers model, ``heads`` the list of head modules in order of k = 2, 3, ...

    ``mask``, bool ``(n + 1, batch, tokens)`` or None: ``mask[k, b, t]`` allows head k a target at t. ``fraction`` is the
    share of its targets that it leaves. ``inputs`` are those of `all_logits`.
    """
    divisor = divisor or (labels[:, 1:] != -100).sum()
    own, *of_heads = cross_entropies(all_logits(model, heads, **inputs), labels, mask)
    total = own / divisor
    for k, cross_entropy in enumerate(of_heads, start=2):
        total = total + beta * gamma * alpha ** (k - 1) * cross_entropy / fraction / divisor
    return total


def cross_entropies(logits: tuple[Tensor, list[Tensor]], labels: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Sums over positions of the cross entropies of the model itself, and of the heads for k = 2, 3, ..."""
    own_logits, head_logits = logits
    sums = [shifted_cross_entropy(own_logits, labels, 1)]
    for k, of_head in enumerate(head_logits, start=2):
        targets = labels if mask is None else labels_where(labels, mask[k], k)
        sums.append(shifted_cross_entropy(of_head, targets, k))
    return sums


def all_logits(
    model,
    heads,
    head_input: str = "last_layer_input",
    parts: Parts | None = None,
    final_norm: bool | None = None,
    **inputs,
) -> tuple[Tensor, list[Tensor]]:
    """The model's own logits and those of every head, ``(batch, tokens, vocabulary)``, with graph.

    ``final_norm``: whether the norm follows a head; None: if it reads the last layer's input.
    """
    parts = parts or Parts.of(model)
    last_layer = model.get_submodule(parts.layers)[-1]
    calls = []
    hook = last_layer.register_forward_pre_hook(lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True)
    outputs = model(**{"use_cache": False} | inputs, output_hidden_states=True)
    hook.remove()
    args, kwargs = calls[0]
    x = (
        args[0] if args else kwargs.pop("hidden_states")
    )  # hidden_states[-2], but for Mamba, which leaves the embeddings out
    if head_input == "last_hidden_state":
        x = outputs.hidden_states[-1]
    if final_norm is None:
        final_norm = head_input == "last_layer_input"

    head_logits = []
    for head in heads:
        states = x
        # A head in fp32 runs in the half precision of its model, as mixed precision does.
        mixed = x.dtype in (torch.bfloat16, torch.float16) and next(head.parameters()).dtype == torch.float32
        with torch.autocast(x.device.type, x.dtype) if mixed else nullcontext():
            for block in head:
                if hasattr(block, "linear"):
                    inner = block.linear(states.to(block.linear.weight.dtype))  # Mamba's stream is in fp32
                    states = states + nn.functional.silu(inner)
                else:
                    states = block(states, *args[1:], **kwargs)
                    states = states if isinstance(states, Tensor) else states[0]
        states = states.to(x.dtype)
        states = parts.norm(states) if final_norm else states
        weight = parts.lm_head.weight
        logits = nn.functional.linear(states.to(weight.dtype), weight, parts.lm_head.bias)
        head_logits.append(parts.after(logits))
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
