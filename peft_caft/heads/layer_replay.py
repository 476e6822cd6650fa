"""A decoder layer of a head, run on hidden states of a forward pass that the base model has made.

`watched_pass.replay` runs it for all positions. `LayerAtRows` computes keys and values of all
positions, but queries and everything after them of selected ones, whatever the architecture.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded
from .watched_pass import CACHES, Captured, evaluating, layer_output, replay

logger = logging.getLogger(__name__)

WORTHWHILE = 0.9  # above this share of the positions, running for all of them is no slower


class LayerAtRows:
    """Runs decoder layers for selected positions, if the first call gives what `replay` gives.

    transformers' attention gives its keys and values to a cache, if there is one, and goes on with
    what the cache returns. So the layer is called twice with a `_Cache`: for all positions, until
    the cache has their keys and values, and for the selected ones, to which it returns these.
    """

    def __init__(self) -> None:
        self.works: bool | None = None  # not known before the first call

    def __call__(
        self, layer: nn.Module, hidden: Tensor, rows: Tensor, captured: Captured, most: int | None = None
    ) -> Tensor | None:
        """Output of the layer at ``rows``; None where this layer or this batch needs `replay`.

        Args:
            layer: the decoder layer.
            hidden: its input, ``(batch, tokens, hidden)``.
            rows: int64 ``(selected,)``, ascending indices into the ``batch * tokens`` positions.
            captured: arguments with which the base model called its last layer.
            most: largest number of ``rows`` in one sequence; None waits for the device.

        Returns:
            ``(selected, hidden)`` in the dtype of the layer's output, or None.
        """
        if self.works is False or not len(rows) or is_sharded(layer) or torch.compiler.is_compiling():
            return None
        batch, tokens = hidden.shape[:2]
        selection = Selection(rows, batch, tokens, most)
        if selection.index.numel() > WORTHWHILE * batch * tokens:
            return None
        arguments = _selected_arguments(layer, hidden, captured, selection)
        if arguments is None:
            return None
        if self.works is None:
            self.works = _agrees_with_replay(layer, hidden, rows, captured, selection, arguments)
            if not self.works:
                logger.info("%s runs for all positions, not for supervised ones alone.", type(layer).__name__)
                return None
        return _at_selection(layer, hidden, captured, selection, arguments)


class Selection:
    """Selected positions of a batch as a rectangle, as wide as the sequence that has most of them.

    Attributes:
        index: int64 ``(batch, most)``, positions within the sequence, padded with 0.
        slots: int64 ``(selected,)``, indices of the selected positions in the flattened rectangle.
    """

    def __init__(self, rows: Tensor, batch: int, tokens: int, most: int | None = None) -> None:
        sequence = rows // tokens
        first = torch.searchsorted(
            rows.contiguous(), torch.arange(0, (batch + 1) * tokens, tokens, device=rows.device)
        )
        most = int(first.diff().max()) if most is None else most
        self.slots = sequence * most + torch.arange(len(rows), device=rows.device) - first[sequence]
        self.index = rows.new_zeros(batch * most).index_copy(0, self.slots, rows % tokens).view(batch, most)

    def of(self, values: Tensor, dim: int = 1) -> Tensor:
        """The selected positions of ``values``, any dtype.

        Its first dimension is the batch, or 1, and ``dim`` the tokens, of which ``most`` remain.
        """
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.index.shape
        return values.take_along_dim(self.index.view(shape), dim)


class _KeysAndValues(Exception):
    """Stops the layer as soon as its keys and values are known."""


class _Cache:
    """Takes the keys and values of a first call, which it stops, and returns them in a second."""

    taken: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.taken is None:
            self.taken = keys, values
            raise _KeysAndValues
        return self.taken


@torch.no_grad()
def _agrees_with_replay(
    layer: nn.Module, hidden: Tensor, rows: Tensor, captured: Captured, selection: Selection, arguments: dict[str, Any]
) -> bool:
    try:
        with evaluating(layer):  # draws would differ, and would not repeat after a resume
            got = _at_selection(layer, hidden, captured, selection, arguments).float()
            expected = replay(layer, hidden, captured).flatten(0, 1)[rows].float()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.info("%s with the queries of some positions: %s", type(layer).__name__, error)
        return False
    half = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype in (torch.bfloat16, torch.float16)
    return bool((got - expected).norm() <= (3e-2 if half else 1e-4) * expected.norm())


def _at_selection(
    layer: nn.Module, hidden: Tensor, captured: Captured, selection: Selection, arguments: dict[str, Any]
) -> Tensor:
    name, cache = _cache_name(layer), _Cache()
    assert name is not None
    try:
        layer(**{**_arguments(layer, hidden, captured), name: cache})
    except _KeysAndValues:
        pass
    else:
        raise NotImplementedError(f"{type(layer).__name__} gives no cache its keys and values")
    output = layer_output(layer(**{**arguments, name: cache}))
    return output.flatten(0, 1)[selection.slots]


def _selected_arguments(
    layer: nn.Module, hidden: Tensor, captured: Captured, selection: Selection
) -> dict[str, Any] | None:
    """The layer's arguments for the selected positions; None if one has an unknown meaning."""
    if _cache_name(layer) is None:
        return None
    batch, tokens = hidden.shape[:2]
    attention = next((m.config._attn_implementation for m in layer.modules() if hasattr(m, "config")), None)
    selected: dict[str, Any] = {}
    for name, value in _arguments(layer, hidden, captured).items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] not in (1, batch):
            return None
        if name == "hidden_states" or (
            name in ("position_ids", "position_embeddings") and _is_about_tokens(value, tokens)
        ):
            selected[name] = tuple(map(selection.of, value)) if isinstance(value, tuple) else selection.of(value)
        elif isinstance(value, Tensor) and name == "attention_mask" and value.dim() == 4 and value.shape[2] == tokens:
            selected[name] = selection.of(value, dim=2)
        elif value is None or isinstance(value, (bool, int, float, str)):
            selected[name] = value
        else:
            return None
    if selected.get("attention_mask") is None:
        if attention != "sdpa":  # only sdpa reads no mask as causal, and takes boolean masks
            return None
        keys = torch.arange(tokens, device=hidden.device)
        selected["attention_mask"] = (selection.index[:, :, None] >= keys)[:, None]
    return selected if attention in ("sdpa", "eager") else None


def _is_about_tokens(value: Any, tokens: int) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, Tensor) and part.dim() >= 2 and part.shape[1] == tokens for part in parts)


def _arguments(layer: nn.Module, hidden: Tensor, captured: Captured) -> dict[str, Any]:
    """All arguments of `replay`'s call by name."""
    bound = inspect.signature(layer.forward).bind(hidden, *captured.layer_args, **captured.layer_kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _cache_name(layer: nn.Module) -> str | None:
    return next((name for name in CACHES if name in inspect.signature(layer.forward).parameters), None)
