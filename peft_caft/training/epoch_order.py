"""`EpochOrder`: the order of the training rows, which depends on the seed and the epoch alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


@dataclass(eq=False, repr=False)
class EpochOrder(Sampler[int]):
    """Shuffled rows; or shuffled batches of rows of about equal length, the longest batch first.

    A resumed run must see the order in which it was interrupted, or it sees some rows of that epoch
    twice and others never. transformers' length-grouped sampler draws from the global generator,
    and accelerate tells a sampler its epoch only in a run of one process (transformers 5.23,
    accelerate 1.15). That sampler also returns fifty batches in a row from long to short, and the
    loss swings with them where long rows differ in kind from short ones.

    Attributes:
        lengths: length of each row in tokens; None shuffles the rows.
        batch_size: rows per optimizer step over all processes, which have about equal length.
        epoch: returns the current epoch, from 0.
    """

    lengths: list[int] | None
    rows: int
    batch_size: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        # The first batch holds the longest row, so that too little memory shows at once. The last
        # one may be smaller than the others, so it stays last.
        first, *others = (indices[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size))
        last = others.pop() if others else []
        order = torch.randperm(len(others), generator=generator).tolist()
        return chain(first, *(others[index] for index in order), last)
