"""Copies of decoder layers that become heads: no adapters, hooks, checkpointing or quantisation."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .backbone import beneath_adapters


def plain_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A deep copy of ``layer`` with trainable parameters; it shares the model's configuration.

    Linear layers that bitsandbytes or torchao have quantised get ``dtype``.

    Raises:
        ValueError: if an adapter is merged into the layer, which hides its own weights.
        TypeError: if weights are quantised in another way (GPTQ, AWQ, HQQ and others).
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
    """Unwrap ``target_parameters`` below ``module``, and make quantised linear layers plain."""
    for name, child in list(module.named_children()):
        bare = beneath_adapters(child)
        if _can_be_dequantised(bare):
            bias = None if bare.bias is None else bare.bias.to(dtype, copy=True)
            bare = linear_of(dequantize_module_weight(bare).detach().to(dtype, copy=True), bias)
        if bare is not child:
            setattr(module, name, bare)
        _simplify(bare, dtype)


def _can_be_dequantised(module: nn.Module) -> bool:
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with the parameters ``weight`` ``(out, in)`` and ``bias`` ``(out,)``.

    nn.Linear would draw its own from the global generator, and PEFT's low_cpu_mem_usage turns every
    parameter that a module registers into a meta tensor (huggingface/peft#1961).
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear._parameters["weight"] = nn.Parameter(weight)
    if bias is not None:
        linear._parameters["bias"] = nn.Parameter(bias)
    return linear
