"""Comparison with figures that were computed in another way, or on another processor."""

from __future__ import annotations

import torch
from torch import Tensor

# Norm, projections, rotation, scores, softmax, values, projection, sum, norm, projections, activation, projection, sum.
LAYER_OPERATIONS = 13


def require_same_up_to_rounding(got: Tensor, expected: Tensor, operations: int) -> None:
    """The difference is no larger than what ``operations`` float32 operations in a row may round.

    Processors sum in other orders, and each operation then rounds otherwise, by about ``eps`` of the numbers that it sums. Sizes
    are norms over all numbers: a single one may be what two large numbers leave of each other, and its rounding is theirs.
    """
    assert got.shape == expected.shape
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= operations * torch.finfo(torch.float32).eps, error
