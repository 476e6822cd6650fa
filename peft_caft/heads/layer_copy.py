"""A plain copy of a decoder layer, to become a head: without adapters, hooks, checkpointing, or
quantised weights.
"""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .backbone import beneath_adapters


def plain_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy of ``layer`` that shares the model's configuration and whose parameters can be
    trained.

    Args:
        layer: a decoder layer, with or without adapters.
        dtype: of linear maps that are quantised in ``layer`` (bitsandbytes, torchao) and plain in
            the copy.

    Raises:
        ValueError: if an adapter is merged into the layer, whose own weights are then not at hand.
        TypeError: if weights are quantised in a way that cannot be undone here (GPTQ, AWQ, HQQ and
            others).
    """
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in layer.modules()):
        raise ValueError(
            "last layer: an adapter is merged into it, expected none. Call unmerge_adapter() before adding an adapter "
            "with decoder_layer heads."
        )
    configs = [module.config for module in layer.modules() if hasattr(module, "config")]
    # The shared configuration lets a later change of the attention implementation reach the copy.
    clone = beneath_adapters(copy.deepcopy(layer, memo={id(config): config for config in configs}))
    _simplify(clone, dtype)
    for module in clone.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    tensors = [*clone.parameters(), *(buffer for name, buffer in clone.named_buffers() if "qweight" in name)]
    quantised = {str(t.dtype).removeprefix("torch.") for t in tensors if not t.is_floating_point()}
    if quantised:
        raise TypeError(
            f"last layer: got weights of dtype {', '.join(sorted(quantised))}, expected floating point, or a quantisation by "
            "bitsandbytes or torchao, to copy into decoder_layer heads. Use head_type='residual', or load the model "
            "unquantised."
        )
    return clone.requires_grad_(True)


def _simplify(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every wrapper below ``module`` by what it wraps, and quantised linear maps by plain
    ones.

    Wrappers may be nested (``target_parameters``).
    """
    for name, child in list(module.named_children()):
        bare = beneath_adapters(child)
        if _can_be_dequantised(bare):
            bare = _plain_linear(bare, dtype)
        if bare is not child:
            setattr(module, name, bare)
        _simplify(bare, dtype)


def _can_be_dequantised(module: nn.Module) -> bool:
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def _plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    weight = dequantize_module_weight(module).detach()
    bias: Tensor | None = module.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, values in (("weight", weight), ("bias", bias)):  # not initialised, which would draw random numbers
        if values is not None:
            linear._parameters[name] = nn.Parameter(values.to(dtype, copy=True))
    return linear
