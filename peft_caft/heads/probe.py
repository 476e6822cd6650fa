"""Runs a base model on a few tokens, to see what it does between its last layer and its logits.

`Backbone` knows of a final norm, an lm_head, a factor and a soft cap. A model that does anything
else is refused here: training would follow a wrong gradient, and nothing else would show it.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sharding import is_sharded
from .unembedding import Unembedding
from .watched_pass import Captured, LayerStack, evaluating, layer_output, replay

TOKENS = 4
UNKNOWN = "CAFT does not know this architecture yet; please report it."
# What a model that is not understood may raise.
ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Probe:
    """What a pass over a few tokens has shown.

    Attributes:
        norm_name: name of the final norm within the trunk; None if there is none.
        scale: factor on the logits.
        softcap: c of ``c * tanh(logits / c)``, or None.
        as_configured: whether factor and soft cap are those of the configuration; if not, the model
            may compute its loss from other logits.
        layer_replays: whether the last layer gives the same if it is called again.
    """

    norm_name: str | None
    scale: float
    softcap: float | None
    as_configured: bool
    layer_replays: bool


@torch.no_grad()
def probe(model: PreTrainedModel, stack: LayerStack, lm_head: nn.Module, unembedding: Unembedding) -> Probe:
    """Run ``model`` without adapters behind its layers, and compare its parts with its output.

    In place of the lm_head's output the model gets a ramp of numbers: they show all that it does
    with logits, which random logits of a young model, all near 0, would not.

    Args:
        stack: its layers.
        lm_head: its lm_head, without adapters.
        unembedding: the same with the expected factor and soft cap.

    Raises:
        TypeError: if the model cannot be run, or does something else.
    """
    token_ids, versions = _ordinary_token_ids(model), _versions(model)
    outputs: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def ramp_instead(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen["linear"] = output
        seen["ramp"] = ramp = 1000 * torch.linspace(-1, 1, output.shape[-1], device=output.device).pow(3).to(
            output.dtype
        )
        return ramp.expand_as(output).clone()

    def keep_output(module: nn.Module, args: tuple, output: Any) -> None:
        seen["layer"] = layer_output(output)

    try:
        with ExitStack() as context:
            context.enter_context(evaluating(model))
            context.enter_context(_base_model_alone(model, stack))
            context.enter_context(_outputs_behind_the_layers(stack, outputs))
            context.enter_context(lm_head.register_forward_hook(ramp_instead))
            context.enter_context(stack.last_layer.register_forward_hook(keep_output))
            records = context.enter_context(stack.capture())
            # Without hooks on the model, which may be those of `FullFineTuning`, and without what
            # accelerate or TRL put in the place of its forward. Not compiled, since the graph would
            # be one with these hooks.
            with torch.compiler.set_stance("force_eager"):
                logits = (
                    type(model)
                    .forward(
                        model,
                        input_ids=token_ids,
                        attention_mask=torch.ones_like(token_ids),
                        use_cache=False,
                        return_dict=True,
                    )
                    .logits
                )
            captured = records[-1]
            states = seen["layer"]
            norm_name = _name_of_norm(states, captured.last_hidden_state, outputs, stack.trunk)
            layer_replays = _replays(stack.last_layer, captured, states)
    except torch.OutOfMemoryError:
        raise
    except ERRORS as error:
        raise TypeError(
            f"model: {type(model).__name__} cannot be run on {TOKENS} tokens to see what it does between its last layer "
            f"and its logits ({type(error).__name__}: {error}). {UNKNOWN}"
        ) from error
    if _versions(model) != versions:
        raise TypeError(
            f"model: {type(model).__name__} changes its weights when it switches between training and evaluation, as RWKV, "
            "expected constant ones. CAFT does not support it."
        )
    if norm_name is None:
        _require_equal(model, "final norm", states, captured.last_hidden_state)
    normed = captured.last_hidden_state.to(unembedding.weight.device, unembedding.weight.dtype)
    plain = torch.nn.functional.linear(normed, unembedding.weight, unembedding.bias)
    if "ramp" not in seen:  # the model multiplies with the weight itself
        _require_equal(model, "logits", unembedding.changed(plain), logits)
        return Probe(norm_name, unembedding.scale, unembedding.softcap, True, layer_replays)
    # The factor may come before the lm_head, on the hidden states (MiniCPM3).
    before = next((f for f in (1.0, unembedding.scale) if _equal(plain * f, seen["linear"])), 1.0)
    _require_equal(model, "lm_head", plain * before, seen["linear"])
    scale, softcap = _factor_and_cap(seen["ramp"], logits[0, -1], unembedding)
    expected = replace(unembedding, scale=scale, softcap=softcap).changed(seen["ramp"].expand_as(logits))
    _require_equal(model, "logits", expected, logits)
    as_configured = (before * scale, softcap) == (unembedding.scale, unembedding.softcap)
    return Probe(norm_name, before * scale, softcap, as_configured, layer_replays)


def _factor_and_cap(ramp: Tensor, logits: Tensor, expected: Unembedding) -> tuple[float, float | None]:
    """Factor and soft cap that make ``logits`` of ``ramp``, both ``(vocabulary,)``."""
    if _equal(expected.changed(ramp), logits):  # the configuration's numbers, which are exact
        return expected.scale, expected.softcap
    x, y = ramp.double(), logits.double()
    cap = y.abs().max()
    below = y.abs() < 0.9 * cap
    inner = torch.atanh(y[below] / cap) * cap
    capped = float(inner @ x[below] / (x[below] @ x[below])), float(cap)
    linear = float(y @ x / (x @ x))
    return (
        capped
        if _equal(replace(expected, scale=capped[0], softcap=capped[1]).changed(ramp), logits)
        else (linear, None)
    )


def _versions(model: nn.Module) -> list[int]:
    """How often parameters were written to, but those that an engine or PEFT writes to itself."""
    if is_sharded(model):
        return []
    wrapped = {p for module in model.modules() if isinstance(module, ParamWrapper) for p in module.parameters()}
    return [parameter._version for parameter in model.parameters() if parameter not in wrapped]


def _ordinary_token_ids(model: PreTrainedModel) -> Tensor:
    """Token ids, int64 ``(1, TOKENS)``, but none that the configuration gives a meaning."""
    numbers = re.findall(r'"\w*token\w*": (\d+)', model.config.to_json_string(use_diff=False))
    special = {int(number) for number in numbers}
    ids = [token for token in range(TOKENS + len(special)) if token not in special][:TOKENS]
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


@contextmanager
def _base_model_alone(model: nn.Module, stack: LayerStack) -> Iterator[None]:
    """Inside the block, adapters behind the layers take no part, unless they are merged.

    Those in the layers change nothing that is compared.
    """
    inside = set(stack.layers.modules())
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and module not in inside
        and not getattr(module, "merged", False)
    ]
    before = [wrapper._disable_adapters for wrapper in wrappers]
    try:
        for wrapper in wrappers:  # enable_adapters(True) afterwards would make frozen adapters trainable
            wrapper._disable_adapters = True
        yield
    finally:
        for wrapper, disabled in zip(wrappers, before, strict=True):
            wrapper._disable_adapters = disabled


@contextmanager
def _outputs_behind_the_layers(stack: LayerStack, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block, keep what each part of the trunk that holds no layer returned last."""
    inside = set(stack.layers.modules())
    with ExitStack() as hooks:
        for name, module in stack.trunk.named_modules():
            if module not in inside and all(part is not stack.layers for part in module.modules()):
                hooks.enter_context(
                    module.register_forward_hook(
                        lambda module, args, output, name=name: outputs.update({name: output})
                    )
                )
        yield


def _name_of_norm(states: Tensor, wanted: Tensor, outputs: dict[str, Tensor], trunk: nn.Module) -> str | None:
    """Name of the part, if any, that maps the last layer's output to the last hidden state."""
    if states is wanted or states.shape != wanted.shape:
        return None
    names = [name for name, output in outputs.items() if isinstance(output, Tensor) and output.shape == wanted.shape]
    outermost_first = sorted(names, key=lambda name: name.count("."))
    for is_it in (_shares_memory, torch.equal):  # the second is of values, which a simulation does not know
        for name in outermost_first:
            if is_it(outputs[name], wanted) and _equal(trunk.get_submodule(name)(states), wanted):
                return name
    return None


def _replays(layer: nn.Module, captured: Captured, output: Tensor) -> bool:
    try:
        got = replay(layer, captured.last_layer_input, captured)
    except ERRORS:
        return False
    return _equal(got, output)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same tensor, or views of one."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _require_equal(model: nn.Module, what: str, got: Tensor, wanted: Tensor) -> None:
    if not _equal(got, wanted):
        if not (got.isfinite().all() and wanted.isfinite().all()):
            raise ValueError(
                f"model: the {what} of {type(model).__name__} for a few tokens are not finite, expected numbers. Its weights are "
                "damaged, or too large for their dtype: load it again, or in bfloat16 or float32."
            )
        raise TypeError(
            f"model: {type(model).__name__} does more between its last layer and its logits than a norm, an lm_head, a "
            f"scale and a soft cap (its {what} differ). {UNKNOWN}"
        )


def _equal(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape:
        return False
    # Under autocast the hidden states may be fp32 and the logits bf16.
    half = {got.dtype, wanted.dtype} & {torch.bfloat16, torch.float16} or torch.is_autocast_enabled(got.device.type)
    got, wanted = got.float(), wanted.to(got.device).float()
    largest = wanted.abs().max().clamp_min(1e-30)  # its square may be too large for fp32
    return bool(((got - wanted) / largest).norm() <= (5e-2 if half else 1e-4) * (wanted / largest).norm() + 1e-6)
