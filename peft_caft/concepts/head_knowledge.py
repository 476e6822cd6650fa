"""Whether auxiliary heads know more about a data set than guessing by frequency does."""

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
        below_unigram: unigram entropy minus `cross_entropy`; at most 0 if a head knows nothing.
    """

    tokens_ahead: int
    cross_entropy: float
    below_unigram: float


def unigram_entropy(rows: list[AlignedRow]) -> float:
    """Entropy of the targets' frequencies, nats/token: the least that blind guessing costs.

    Few rows have less of it than their language, so a head that beats it does know something.
    """
    counts = Counter(row.input_ids[target.position] for row in rows for target in row.targets)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def head_knowledge(
    heads: AuxiliaryHeads, model: nn.Module, rows: list[AlignedRow], collate: Callable, batch_size: int
) -> list[HeadKnowledge]:
    """Each head's cross entropy over all targets that it has in ``rows`` (`evaluate_heads`)."""
    entropy = unigram_entropy(rows)
    found = evaluate_heads(heads, model, [row.encoded for row in rows], collate, batch_size).heads
    return [HeadKnowledge(h.tokens_ahead, h.cross_entropy, entropy - h.cross_entropy) for h in found if h.tokens]
