"""CAFT under torch.compile: the same losses and gradients, and a bounded number of graph breaks."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_caft import CAFTConfig
from peft_caft.config import HEAD_TYPES

from .tiny_models import tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:CAFTConfig.heads is None")


def caft(**fields):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "aux_loss_weight": 0.7, "aux_loss_schedule": "constant"}
    return get_peft_model(tiny_model("llama", attention="sdpa"), CAFTConfig(**settings | fields)).train()


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_compiled_model_trains_as_an_eager_one(head_type):
    labels = tokens().clone()
    labels[:, :7] = -100
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        model = caft(head_type=head_type)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(3):
            model.zero_grad()
            loss = call(input_ids=tokens(), labels=labels, use_cache=False).loss
            loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected_loss, expected), (loss, got) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    breaks = torch._dynamo.utils.counters["graph_break"]
    print(dict(torch._dynamo.utils.counters["stats"]), dict(breaks))
    assert sum(breaks.values()) <= 10
