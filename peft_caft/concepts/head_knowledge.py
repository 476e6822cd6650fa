"""Whether auxiliary heads know anything about a data set: their cross entropy against that of
guessing by frequency.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..heads.auxiliary_heads import AuxiliaryHeads
from ..training.head_metrics import evaluate_heads
from .alignment import AlignedRow


@dataclass(frozen=True)
class HeadKnowledge:
    """One head on the targets of a data set.

    Attributes:
        tokens_ahead: k.
        cross_entropy: mean, nats/token.
        below_unigram: by how much that is less than the unigram entropy, nats/token; at most 0 for
            a head that knows nothing of these data.
    """

    tokens_ahead: int
    cross_entropy: float
    below_unigram: float


def unigram_entropy(rows: list[AlignedRow]) -> float:
    """Entropy of the targets' own frequencies, nats/token: the least that a guess without any
    context can have.

    Of few rows it is less than that of the language they are drawn from, so a head that beats it
    does know something.
    """
    counts = Counter(row.input_ids[target.position] for row in rows for target in row.targets)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def head_knowledge(
    heads: AuxiliaryHeads, model: nn.Module, rows: list[AlignedRow], collate: Callable, batch_size: int
) -> list[HeadKnowledge]:
    """Each head's cross entropy over all targets that it has in ``rows``.

    Args:
        heads, model, collate, batch_size: as for `peft_caft.training.head_metrics.evaluate_heads`.
    """
    entropy = unigram_entropy(rows)
    found = evaluate_heads(heads, model, [row.encoded for row in rows], collate, batch_size).heads
    return [HeadKnowledge(h.tokens_ahead, h.cross_entropy, entropy - h.cross_entropy) for h in found if h.tokens]
