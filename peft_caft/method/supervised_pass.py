"""`SupervisedPass`: what the objective needs of a forward pass, whoever makes its loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..heads.watched_pass import Captured


@dataclass
class SupervisedPass(ABC):
    """A forward pass of the base model with labels, to which the auxiliary loss is added.

    Attributes:
        outputs: the model's outputs.
        captured: record of the pass for the heads.
        supervised: number of next-token targets.
        divisor: number by which all losses are divided; fp32 scalar.
    """

    outputs: Any
    captured: Captured
    supervised: int
    divisor: Tensor

    @abstractmethod
    def with_auxiliary(self, total: Tensor) -> Any:
        """The model's outputs with ``total``, the weighted auxiliary losses, in them.

        ``total`` is divided by ``divisor``; fp32 scalar with graph, nats.
        """
