"""A forward pass with the model's own next-token loss, CE_1, but without its logits.

transformers' causal language models compute the logits of all tokens and keep them for the backward
pass. Here the model runs up to its final hidden states, and `linear_cross_entropy` does the rest.
"""

import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from ..heads.backbone import Backbone
from ..heads.watched_pass import Captured
from .linear_cross_entropy import as_scalar, linear_cross_entropy, split_factor
from .supervised_pass import SupervisedPass
from .targets import IGNORE_INDEX, SupervisedRows

LOGITS_LEFT_OUT = (
    "logits: left out in training, where CAFT computes the loss without them. Call the model with logits_to_keep=0 to have them "
    "all. A loss of one's own must contain outputs.loss, of which the auxiliary loss is a part."
)


class LogitsLeftOut:
    """Stands where the logits would be; whoever uses it is told how to get them."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(LOGITS_LEFT_OUT)

    __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = __array__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __matmul__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rmatmul__ = __neg__ = __abs__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {LOGITS_LEFT_OUT}")  # so that hasattr is False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(LOGITS_LEFT_OUT)


@dataclass
class NextToken(SupervisedPass):
    """A forward pass of the base model and its next-token loss.

    ``divisor`` is ``num_items_in_batch`` if the trainer passed it, else the number of targets.

    Attributes:
        loss: CE_1 and what the model adds to it, such as the load balancing of a mixture of
            experts; scalar with graph, nats, 0 if there is no target.
        logits_left_out: whether ``outputs`` hold no logits.
    """

    loss: Tensor
    logits_left_out: bool

    def with_auxiliary(self, total: Tensor) -> Any:
        """Outputs with ``total`` in the loss; logits are complete or a `LogitsLeftOut`."""
        loss = self.loss + total.to(self.loss.device)
        if not isinstance(self.outputs, ModelOutput):
            return (loss, *self.outputs[1:])
        changed = {"loss": loss, "logits": LogitsLeftOut()} if self.logits_left_out else {"loss": loss}
        return type(self.outputs)(**dict(self.outputs) | changed)


def next_token_pass(
    backbone: Backbone, kwargs: dict[str, Any], supervised: SupervisedRows, leave_out_logits: bool = True
) -> Generator[dict[str, Any], Any, NextToken]:
    """A call of the base model: yields keyword arguments, is sent outputs, and returns the pass.

    It does so twice if the model needs its logits.

    Args:
        kwargs: keyword arguments of its forward, with ``labels``: int64 ``(batch, tokens)``.
        supervised: the model's own targets among them.
        leave_out_logits: False lets the model compute its logits and its loss itself.

    Raises:
        ValueError: if the model returns no loss.
    """
    # The mean over no tokens is NaN. Then the loss is 0, whatever the model adds to it.
    has_mean = supervised.count > 0 or kwargs.get("num_items_in_batch") is not None
    if leave_out_logits and logits_can_be_left_out(backbone, kwargs):
        with backbone.capture(kwargs["labels"]) as records:
            outputs = yield _without_logits(kwargs)
        if backbone.logits_needed is None:
            # A model that does not understand these arguments takes the mean over no tokens: NaN.
            understood = outputs.loss is not None and bool(torch.isfinite(outputs.loss.detach()))
            backbone.logits_needed = not (understood and backbone.probed().as_configured)
        if not backbone.logits_needed:
            divisor, loss = _mean_loss(backbone, records[-1], kwargs, supervised)
            loss = loss + outputs.loss.to(loss.device) * float(has_mean)
            return NextToken(outputs, records[-1], supervised.count, divisor, loss, True)
    with backbone.capture(kwargs["labels"]) as records:
        outputs = yield kwargs
    loss, logits = _loss_and_logits(outputs)
    if not has_mean:  # a zero with graph makes every gradient 0
        loss = logits[:1, :1].float().sum() * 0.0
    elif supervised.count and not backbone.shift_verified:
        _refuse_shifted_labels(backbone, loss, logits, kwargs["labels"])
    divisor = _divisor(kwargs, supervised.count, loss.device)
    return NextToken(outputs, records[-1], supervised.count, divisor, loss, False)


def logits_can_be_left_out(backbone: Backbone, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass with labels need not compute the logits of all tokens.

    It must if the caller asks for them (``logits_to_keep``) or for a tuple, or if the model has
    another loss than transformers' usual one, or an lm_head that is trained or has an adapter.
    """
    model = backbone.model
    parameters = inspect.signature(model.forward).parameters
    return (
        not backbone.logits_needed
        and "logits_to_keep" not in kwargs
        and kwargs.get("return_dict") is not False
        and getattr(model.config, "return_dict", True)
        and model.loss_function is ForCausalLMLoss
        and model.get_output_embeddings() is backbone.lm_head
        and "logits_to_keep" in parameters
        and any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # which take num_items_in_batch
    )


def _without_logits(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for no logits at all, and a loss without targets.

    That loss is what the model adds to the cross entropy, else 0.
    """
    labels = kwargs["labels"]
    nothing = labels.new_empty((len(labels), 0))
    no_tokens = torch.empty(0, dtype=torch.long, device=labels.device)
    return kwargs | {"labels": nothing, "shift_labels": nothing, "num_items_in_batch": 1, "logits_to_keep": no_tokens}


def _mean_loss(
    backbone: Backbone, captured: Captured, kwargs: dict[str, Any], supervised: SupervisedRows
) -> tuple[Tensor, Tensor]:
    """Divisor, and CE_1: fp32 scalar with graph, nats."""
    own = supervised.to(captured.last_hidden_state.device)
    divisor = _divisor(kwargs, own.count, own.rows.device)
    weight, power_of_two = split_factor(1 / divisor)
    states = captured.last_hidden_state.flatten(0, 1)[own.rows]
    loss, _ = linear_cross_entropy(states, own.targets, backbone.unembedding(captured), weight.expand(own.count))
    return divisor, loss * power_of_two


@torch.no_grad()
def _refuse_shifted_labels(backbone: Backbone, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Raise a TypeError if logits are compared with labels of the same position, as in XLNet."""
    backbone.shift_verified = True
    rows = zip(logits, labels.to(logits.device), strict=True)
    total = sum(nn.functional.cross_entropy(row.float(), own, reduction="sum") for row, own in rows)
    unshifted = total / (labels != IGNORE_INDEX).sum().to(logits.device)
    if (loss - unshifted).abs() < 1e-4 * unshifted:
        raise TypeError(
            f"model: {type(backbone.model).__name__} compares logits with labels of the same position, expected a model that shifts "
            "labels by one, as causal language models of transformers do. CAFT does not support it."
        )


def _divisor(kwargs: dict[str, Any], supervised: int, device: torch.device) -> Tensor:
    given = kwargs.get("num_items_in_batch")
    return as_scalar(max(1, supervised) if given is None else given, device)


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(outputs, ModelOutput):
        loss, logits = outputs.loss, outputs.logits
    else:  # a tuple, in which a mixture of experts puts its router's loss, a scalar, before the logits
        loss, logits = outputs[0], next(value for value in outputs if isinstance(value, Tensor) and value.dim() == 3)
    if loss is None:
        raise ValueError(
            "labels: given, but the model returned no loss, expected its next-token loss. This trainer computes the "
            "loss itself; train with transformers.Trainer, or wrap the step in auxiliary_loss_enabled(False)."
        )
    return loss, logits
