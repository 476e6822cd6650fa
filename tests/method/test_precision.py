"""CAFT in half precision with a gradient scaler; quantised base models have tests of their own."""

from __future__ import annotations

import pytest
import torch

from peft_caft.heads.config import HEAD_TYPES

from ..support.gradients import caft, gradients
from ..support.tiny_checkpoint import tiny_llama
from ..support.tiny_models import tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")


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
