"""Watching a forward pass of the base model with hooks; `Captured` is what the heads need of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from .unembedding import Unembedding

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # transformers' names; `cache` from 5.24
# Arguments of the last layer that heads do not need; layers ignore those of the loss.
DROPPED_ARGUMENTS = (*CACHES, "use_cache", "labels", "shift_labels", "num_items_in_batch")


@dataclass
class Captured:
    """What the heads need of one forward pass of the base model.

    Attributes:
        last_layer_input: hidden states that enter the last decoder layer, ``(batch, tokens,
            hidden)`` in the model's dtype, with their graph.
        last_hidden_state: hidden states after the final norm, same shape.
        layer_args, layer_kwargs: further arguments of the last layer (mask, ...), but no cache.
        unembedding: lm_head of this pass, which `Backbone.unembedding` keeps here.
    """

    last_layer_input: Tensor
    last_hidden_state: Tensor
    layer_args: tuple[Any, ...] = ()
    layer_kwargs: dict[str, Any] = field(default_factory=dict)
    unembedding: Unembedding | None = None


@dataclass(kw_only=True)
class LayerStack:
    """The decoder layers of a base model, and the module that runs them.

    Attributes:
        trunk: runs the layers and the final norm.
        layers: its decoder layers.
        layers_return_tuples: whether a layer returns a tuple; known after the first captured pass.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    layers_return_tuples: bool = False

    @property
    def last_layer(self) -> nn.Module:
        """The last layer, or what ``modules_to_save`` or FSDP has wrapped around it meanwhile."""
        return self.layers[-1]

    @contextmanager
    def capture(self, labels: Tensor | None = None) -> Iterator[list[Captured]]:
        """Record each forward pass inside the block in the list that this yields.

        Raises:
            ValueError: if a pass has other positions than ``labels``, ``(batch, tokens)``.
        """
        records: list[Captured] = []
        seen: dict[str, Any] = {}

        def before_last_layer(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if "hidden" in seen:
                raise TypeError(
                    f"model: the last layer of {type(self.trunk).__name__} runs more than once in a pass, expected once. CAFT does "
                    "not support it."
                )
            kwargs = {n: v for n, v in kwargs.items() if n not in DROPPED_ARGUMENTS and not isinstance(v, Cache)}
            seen["hidden"] = args[0] if args else kwargs.pop("hidden_states")
            seen["args"] = tuple(None if isinstance(value, Cache) else value for value in args[1:])
            seen["kwargs"] = kwargs

        def after_last_layer(module: nn.Module, args: tuple, output: Any) -> None:
            self.layers_return_tuples = not isinstance(output, Tensor)

        def after_trunk(module: nn.Module, args: tuple, output: Any) -> None:
            if "hidden" not in seen:  # pytorch/pytorch#117758
                raise RuntimeError(
                    "torch.compile: a graph that was compiled without hooks ran in place of the last layer, as torch before 2.13 "
                    "does where evaluation comes before training. Set torch._dynamo.config.skip_nnmodule_hook_guards = False before "
                    "training, or use a newer torch."
                )
            last_hidden_state = output["last_hidden_state"] if isinstance(output, dict) else output[0]
            if labels is not None and labels.shape != last_hidden_state.shape[:2]:
                raise ValueError(
                    f"labels: got shape {tuple(labels.shape)}, expected {tuple(last_hidden_state.shape[:2])}, one label for each "
                    f"position of the last hidden state of {type(module).__name__}. Give a label to each token, -100 where there is "
                    "none; a model that adds positions by itself, such as those of an image, is not supported."
                )
            records.append(Captured(seen["hidden"], last_hidden_state, seen["args"], seen["kwargs"]))
            seen.clear()

        with (
            self.last_layer.register_forward_pre_hook(before_last_layer, with_kwargs=True),
            self.last_layer.register_forward_hook(after_last_layer),
            self.trunk.register_forward_hook(after_trunk),
        ):
            yield records

    @contextmanager
    def starting_at_last_layer(self, hidden: Tensor | None) -> Iterator[None]:
        """Inside the block, only the last layer runs, on ``hidden``.

        Args:
            hidden: ``Captured.last_layer_input`` of an earlier pass over the same tokens, or None.
        """
        if hidden is None:
            yield
            return

        def replace_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        skipped = list(self.layers)[:-1]
        with self.last_layer.register_forward_pre_hook(replace_input, with_kwargs=True, prepend=True):
            try:
                for index, layer in enumerate(skipped):
                    self.layers[index] = _PassedOver(layer, self.layers_return_tuples)
                yield
            finally:
                for index, layer in enumerate(skipped):
                    self.layers[index] = layer


class _PassedOver(nn.Module):
    """Does nothing in place of a decoder layer, whose attributes the model may still read."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered, since it takes no part in the pass
        self.returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside the block ``module`` is in evaluation mode, so that no dropout draws anything."""
    # Linear4bit (bitsandbytes 0.50.2) would pack its weight in an evaluation on a CPU, and training
    # after it would read that wrongly.
    training = [p for p in module.modules() if p.training and not hasattr(p, "support_avx512bf16_for_cpu")]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def replay(layer: nn.Module, hidden: Tensor, captured: Captured) -> Tensor:
    """Output of ``layer`` for ``hidden``, both ``(batch, tokens, hidden)`` in the layer's dtype.

    The mask and positions are those of the captured pass.
    """
    return layer_output(layer(hidden, *captured.layer_args, **captured.layer_kwargs))


def layer_output(output: Any) -> Tensor:
    """Hidden states ``(batch, tokens, hidden)`` in what a decoder layer returned."""
    return output if isinstance(output, Tensor) else output[0]  # a tuple: written for transformers 4
