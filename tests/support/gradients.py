"""Models with an adapter that is no longer zero, and comparisons of their parameters and gradients."""

from __future__ import annotations

import torch
from peft import get_peft_model

from peft_caft import CAFTConfig


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


SETTINGS = {"r": 4, "target_modules": "all-linear", "aux_loss_weight": 0.7, "aux_loss_schedule": "constant"}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def caft(base, **fields):
    torch.manual_seed(0)
    model = get_peft_model(base, CAFTConfig(**SETTINGS | fields)).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
