"""A forward pass for TRL's SFTTrainer, which computes the loss itself.

``SFTTrainer.compute_loss`` (trl 1.16) calls the model with ``fused_lm_head=True``, gets a
log-probability for every label, and takes

    loss = -sum(log_probs) / num_items_in_batch

There is no loss to add the auxiliary loss to. So its gradient is attached to ``log_probs``, whose
values do not change: the trainer's factor on them applies to it too.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..heads.backbone import Backbone
from .supervised_pass import SupervisedPass
from .targets import SupervisedRows


@dataclass
class LogProbsPass(SupervisedPass):
    """A forward pass of the base model that returned log-probabilities.

    ``outputs`` hold ``log_probs``, fp32 ``(batch, tokens - 1)``, nats, 0 where there is no label,
    and ``label_mask``, bool of that shape. ``divisor`` is 1, since the trainer divides.
    """

    def with_auxiliary(self, total: Tensor) -> Any:
        """The outputs with the gradient of ``total``, fp32 scalar, in their log-probabilities.

        Their own loss, which is a mean, gets ``total`` over the number of targets, nats.
        """
        total = total.to(self.outputs.log_probs.device)
        log_probs = _CarryingGradient.apply(self.outputs.log_probs, total, self.outputs.label_mask)
        loss = self.outputs.loss + total / max(1, self.supervised)
        return type(self.outputs)(**dict(self.outputs) | {"log_probs": log_probs, "loss": loss})


def log_probs_pass(
    backbone: Backbone, kwargs: dict[str, Any], supervised: SupervisedRows
) -> Generator[dict[str, Any], Any, LogProbsPass]:
    """A call of the base model: yields keyword arguments, is sent outputs, and returns the pass."""
    with backbone.capture(kwargs["labels"]) as records:
        outputs = yield kwargs
    one = torch.ones((), device=outputs.log_probs.device)
    return LogProbsPass(outputs, records[-1], supervised.count, one)


class _CarryingGradient(torch.autograd.Function):
    """Returns ``log_probs``; in the backward pass ``total`` gets minus the gradient of each."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, total: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return log_probs.view_as(log_probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        lowest = torch.where(mask, grad, float("inf")).amin()
        highest = torch.where(mask, grad, float("-inf")).amax()
        if bool(lowest < highest):
            raise ValueError(
                "log_probs: the loss weighs tokens differently, expected their negative sum times one factor, as in SFTTrainer: "
                "the auxiliary loss is defined beside that. Weigh all tokens alike, or wrap the step in "
                "auxiliary_loss_enabled(False)."
            )
        return grad, torch.where(mask.any(), -lowest, 0.0), None
