"""The heads that a configuration asks for: loaded or fresh, with or without LoRA inside."""

import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..heads.auxiliary_heads import AuxiliaryHeads
from .config import CAFTConfig
from .objective_config import ObjectiveConfig


def make_heads(config: ObjectiveConfig, model: nn.Module) -> AuxiliaryHeads:
    """Load or make heads for ``model``, and write what they are into the configuration."""
    if config.heads is not None:
        heads = AuxiliaryHeads.from_pretrained(config.heads, base_model=model, revision=config.heads_revision)
        heads.keep_first(config.num_auxiliary_heads, config.heads)
        config.heads_commit = heads.commit
    else:
        warnings.warn(
            f"{type(config).__name__}.heads is None: fresh, untrained auxiliary heads. They inject noise into fine-tuning; pretrain "
            "them once per base model (`peft-caft train-heads`) and give their folder or Hub id as `heads`.",
            stacklevel=2,
        )
        heads = AuxiliaryHeads.from_base_model(
            model, config.num_auxiliary_heads, config.head_type, config.head_input, config.head_num_layers
        )
    for name in ("head_type", "head_input", "head_num_layers"):
        setattr(config, name, getattr(heads.config, name))
    return heads


def add_lora(heads: AuxiliaryHeads, config: CAFTConfig, adapter_name: str) -> None:
    """Put LoRA of the adapter's rank into every linear layer of the heads."""
    targets = [name for name, module in heads.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in heads.modules()),  # GPT-2
    )
    with torch.random.fork_rng():
        inject_adapter_in_model(lora, heads, adapter_name)
        # PEFT's low_cpu_mem_usage makes parameters registered here meta tensors, to be filled from
        # the adapter's file (huggingface/peft#1961); LoRA inside heads is in no file.
        for layer in [module for module in heads.modules() if isinstance(module, LoraLayer)]:
            device = layer.get_base_layer().weight.device
            linears = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
            if any(linear.weight.is_meta for linear in linears):
                for linear in linears:
                    linear._parameters["weight"] = nn.Parameter(torch.empty_like(linear.weight, device=device))
                layer.reset_lora_parameters(adapter_name, True)
