"""`EpochOrder`: the order of the training rows, drawn anew for each epoch from the seed and the
epoch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochOrder(Sampler[int]):
    """Shuffled rows, or rows in batches of about one length, the batches shuffled but for the
    first.

    An interrupted run must meet, when it is taken up, the order that it was interrupted in:
    otherwise some rows of that epoch are seen twice and others never. transformers' length-grouped
    sampler draws from the global generator, and accelerate tells a sampler its epoch only in a run
    of one process (transformers 5.23, accelerate 1.15). transformers' also gives fifty batches in a
    row from long to short, and where long rows are of another kind than short ones the loss swings
    with them.

    Args:
        lengths: of the rows, in tokens; None for shuffled rows.
        rows: their number.
        batch_size: rows per optimizer step, over all processes: what is seen together has about one
            length.
        seed: of the order.
        epoch: tells the current epoch, from 0.
    """

    def __init__(
        self, lengths: list[int] | None, rows: int, batch_size: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = lengths
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first holds the longest row, so that too little memory shows at once; the last may be
        # smaller.
        first, *others = (indices[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size))
        last = others.pop() if others else []
        order = torch.randperm(len(others), generator=generator).tolist()
        return chain(first, *(others[index] for index in order), last)
