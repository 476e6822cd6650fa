"""The Triton candidate of ``benchmarks/gpu`` in Triton's interpreter (``TRITON_INTERPRET=1``), against the plain cross entropy."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # which Triton reads when the kernel is made
    pytest.skip("see `make test-optional`", allow_module_level=True)

from gpu import triton_cross_entropy

from peft_caft.heads.unembedding import Unembedding
from peft_caft.method.linear_cross_entropy import plain_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.3, 3.0, True)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (7, 97), (5, 64), (3, 131)])
def test_losses_and_gradient_equal_the_plain_ones(rows, vocabulary, scale, softcap, biased, dtype, monkeypatch):
    """With blocks smaller than the vocabulary, equal to it, and larger."""
    monkeypatch.setattr(triton_cross_entropy, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if biased else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    exact_hidden = hidden.float().clone().requires_grad_()
    exact_layer = Unembedding(weight.float(), bias.float() if biased else None, scale, softcap)
    total, expected = plain_cross_entropy(exact_hidden, targets, exact_layer, weights)
    total.backward()
    layer = Unembedding(weight, bias, scale, softcap)
    losses, gradient = triton_cross_entropy.losses_and_gradient(hidden, targets, layer, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    assert (gradient.float() - exact_hidden.grad).norm() <= tolerance * exact_hidden.grad.norm()


def test_rows_count_alike_without_weights():
    hidden, weight = torch.randn(4, 8), torch.randn(33, 8)
    targets = torch.tensor([0, 5, 32, 7])
    layer = Unembedding(weight)
    plain = triton_cross_entropy.losses_and_gradient(hidden, targets, layer)
    ones = triton_cross_entropy.losses_and_gradient(hidden, targets, layer, torch.ones(4))
    torch.testing.assert_close(plain, ones)
