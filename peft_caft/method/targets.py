"""Which positions supervise the model and each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .documents import Documents

IGNORE_INDEX = -100


@dataclass(frozen=True)
class SupervisedRows:
    """Positions of a batch that supervise the model itself, or one head.

    Attributes:
        rows: int64 ``(supervised,)``, ascending indices into the ``batch * tokens`` positions.
        targets: int64 ``(supervised,)``, token ids.
        count: number of positions before a draw.
        most: largest number of ``rows`` in one sequence.
    """

    rows: Tensor
    targets: Tensor
    count: int
    most: int

    def to(self, device: torch.device) -> SupervisedRows:
        """The same on another device."""
        return replace(self, rows=_sent(self.rows, device), targets=_sent(self.targets, device))


@dataclass(frozen=True)
class Supervision:
    """Which positions of a batch supervise the model's own loss and the auxiliary heads.

    Attributes:
        next_token: positions of the model's own targets, one token ahead.
        heads: those of each head, ``heads[i]`` with targets i + 2 tokens ahead.
        fraction: p. Each position of a head was drawn with probability p and weighs 1/p.
    """

    next_token: SupervisedRows
    heads: list[SupervisedRows]
    fraction: float = 1.0

    @classmethod
    def of(
        cls,
        labels: Tensor,
        num_heads: int,
        inputs: Mapping[str, Any] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        draw_predicted: bool = False,
    ) -> Supervision:
        """Find the positions of all heads in one pass; the host waits for the device once.

        Position t has a target k tokens ahead if label[t+k] is set. For a head, neither t nor t+k
        is padding, and both are in one document.

        Args:
            labels: int64 ``(batch, tokens)``, unshifted, -100 where unsupervised.
            num_heads: number of heads, n - 1.
            inputs: keyword arguments of the model, among them what tells `Documents` and padding.
            fraction: p in (0, 1], which leaves the expectation of loss and gradient unchanged.
            seed: seed of the draw, on which no other random number depends. It is over all
                positions, on the CPU, so that all heads and all devices draw the same.
            draw_predicted: keep a row if the position before its target, which predicts it without
                a head, is drawn, rather than the row itself.

        Raises:
            ValueError: if documents cannot be told by what ``inputs`` hold.
        """
        is_target = labels != IGNORE_INDEX
        documents = Documents.of(inputs or {}, labels)
        before = torch.stack([
            _with_target(is_target, 1),
            *(_with_target(is_target, k, documents) for k in range(2, num_heads + 2)),
        ])  # fmt: skip
        kept = before
        if fraction < 1:
            drawn = torch.rand(labels.numel(), generator=torch.Generator().manual_seed(seed)) < fraction
            drawn = _sent(drawn, labels.device)
            shifts = [index + 1 if draw_predicted else 0 for index in range(num_heads)]
            of_heads = torch.stack([drawn.roll(-shift) for shift in shifts]).view_as(before[1:])
            kept = torch.cat([before[:1], before[1:] & of_heads])
        in_sequences = kept.sum(2)
        numbers = torch.stack([before.sum((1, 2)), in_sequences.sum(1), in_sequences.amax(1)])
        counts, sizes, most = numbers.tolist()  # here the host waits
        flat = labels.flatten()
        found = []
        for index, places in enumerate(_indices(kept.flatten(), sum(sizes)).split(sizes)):
            rows = places - index * labels.numel()
            found.append(SupervisedRows(rows, flat[rows + index + 1], counts[index], most[index]))
        return cls(found[0], found[1:], fraction)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on a device; the host waits for a copy unless that goes to CUDA.

    On its way to MPS the memory that it is read from may be freed (pytorch/pytorch#189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def _with_target(is_target: Tensor, tokens_ahead: int, documents: Documents | None = None) -> Tensor:
    """Whether each position has a target so many tokens ahead, bool ``(batch, tokens)``."""
    valid = is_target[:, tokens_ahead:]
    for in_one in documents.contain_both(tokens_ahead) if documents else []:
        valid = valid & in_one
    return torch.nn.functional.pad(valid, (0, is_target.shape[1] - valid.shape[1]))


def _indices(mask: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` true entries of a flat mask; ``nonzero`` would wait for a GPU."""
    slots = torch.where(mask, mask.cumsum(0) - 1, count)  # all others write to the slot behind the last
    positions = torch.arange(len(mask), device=mask.device)
    return positions.new_empty(count + 1).scatter_(0, slots, positions)[:count]
