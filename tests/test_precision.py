"""CAFT in half precision with a gradient scaler; quantised base models have tests of their own."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_caft import CAFTConfig
from peft_caft.heads.config import HEAD_TYPES

from .tiny_checkpoint import tiny_llama
from .tiny_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")
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


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_gradient_scaler_changes_nothing(head_type):
    """In fp16 autocast losses are scaled by 2^16 before the backward pass; unscaled, gradients are those of fp32."""
    found = []
    for scaled in (False, True):
        model = caft(tiny_llama(), head_type=head_type)
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        if not scaled:
            loss.backward()
        else:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        found.append(gradients(model))
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 0.02 * expected.norm() + 1e-4, name
