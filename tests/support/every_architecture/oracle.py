"""Does CAFT train a model as an oracle says that does not know how CAFT finds its parts?

The oracle changes by a hook what the last decoder layer of the adapted model returns, and takes the model's own logits: they
contain whatever the architecture does after its layers. It shares no code with `peft_caft.heads`.
"""

from __future__ import annotations

import copy
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Cache, PreTrainedModel
from transformers.models.auto import modeling_auto

from peft_caft import CAFTConfig

from ...reference import shifted_cross_entropy
from .configs import tiny_config
from .image_inputs import with_images

TEXT, VISION, IMAGES = "text", "vision", "images"  # a causal model; one that takes images, without and with an image
AUTO = {TEXT: AutoModelForCausalLM, VISION: AutoModelForImageTextToText, IMAGES: AutoModelForImageTextToText}
MODEL_TYPES = {
    TEXT: tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    VISION: tuple(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    IMAGES: tuple(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}
EQUAL, REFUSED, NOT_BUILT, MODEL_FAILS, NO_IMAGE, FAULT = (
    "equal",
    "refused",
    "not built",
    "transformers fails",
    "no image found that it takes",
    "FAULT",
)
HEADS, SUPERVISED = 2, 8
OBJECTIVE = {
    "num_auxiliary_heads": HEADS,
    "aux_loss_weight": 1.0,
    "aux_loss_decay": 1.0,
    "aux_loss_schedule": "constant",
}
LAYERS_OF = {"BltForCausalLM": "model.local_decoder.layers"}  # one of five lists
Head = Callable[[Tensor, tuple, dict[str, Any]], Tensor]  # the last layer's input and its further arguments -> states


@dataclass
class Outcome:
    """``kind`` is one of the constants above; ``detail`` is the message, or how far off a loss is."""

    kind: str
    detail: str = ""


class Fails(Exception):
    """A part of a case that failed before CAFT could be wrong."""

    def __init__(self, kind: str, error: Exception) -> None:
        super().__init__(said(error))
        self.kind = kind


@contextmanager
def failing_is(kind: str) -> Iterator[None]:
    try:
        yield
    except Fails:
        raise
    except Exception as error:
        raise Fails(kind, error) from error


def build(kind: str, model_type: str) -> PreTrainedModel:
    """In fp32 and without noise; no vector is all ones or zeros, so that leaving a norm or bias out shows."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AUTO[kind].from_config(config, attn_implementation="eager", dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.data += 0.3 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def inputs_of(kind: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows, the second of them padded."""
    if kind == IMAGES:
        with failing_is(NO_IMAGE):
            given = with_images(model.eval())
    else:
        given = {"input_ids": torch.randint(20, 60, (2, 14), generator=torch.Generator().manual_seed(0))}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            given["mm_token_type_ids"] = torch.zeros_like(given["input_ids"])
    mask = torch.ones_like(given["input_ids"])
    mask[1, -1] = 0
    return given | {"attention_mask": mask}


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """The last tokens are an answer; in the second row it has a gap and padding after it."""
    labels = given["input_ids"].clone()
    labels[:, :-SUPERVISED] = -100
    labels[1, -5] = -100
    return labels.masked_fill(given["attention_mask"] == 0, -100)


def text_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: the first list of their number in the text model, which is searched level by level."""
    if type(model).__name__ in LAYERS_OF:
        return model.get_submodule(LAYERS_OF[type(model).__name__])
    config = model.config.get_text_config(decoder=True)
    counts = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "num_layers_per_stack")}
    queue = [_text_model(model)]
    while queue:
        module = queue.pop(0)
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            return module
        queue.extend(module.children())
    raise LookupError(f"no list of {counts} layers")


def _text_model(model: nn.Module) -> nn.Module:
    decoder = model.get_decoder()
    return model if isinstance(decoder, nn.Linear) else decoder  # ModernBERT names its unembedding `decoder`


def adapted(base: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """In training mode, with adapters and residual heads far from their trivial initial values."""
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for block in (m for m in model.modules() if type(m).__name__ == "ResidualBlock"):
        block.linear.weight.data += 0.1 * torch.randn(block.linear.weight.shape, generator=generator)
    return model


def lora_targets(base: PreTrainedModel) -> list[str]:
    """Plain linear layers of the decoder layers, but the kernels of Mamba read the weight of out_proj without its adapter."""
    layers = text_layers(base)
    (prefix,) = [name for name, module in base.named_modules() if module is layers]
    kinds = ("Linear", "FalconLinear", "Conv1D")  # but no router or grouped layer, which plain LoRA cannot adapt
    linear = [name for name, module in layers.named_modules() if type(module).__name__ in kinds]
    return [f"{prefix}.{name}" for name in linear if name.split(".")[-1] != "out_proj"]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    """Of all trained parameters, in order."""
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def call(model: nn.Module, given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return model(**given)


@contextmanager
def layer_returns(layer: nn.Module, head: Head, final_norm: bool = False) -> Iterator[None]:
    """Inside, a layer returns what a head computes from its input; a final norm, from its output."""
    calls = []

    def instead(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        calls.append(None)
        if final_norm:
            return head(output, (), {})
        further = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        hidden = args[0] if args else further.pop("hidden_states")
        states = head(hidden, tuple(None if isinstance(value, Cache) else value for value in args[1:]), further)
        return states if isinstance(output, Tensor) else type(output)((states, *output[1:]))

    with layer.register_forward_hook(instead, with_kwargs=True):
        yield
    if len(calls) != 1:
        raise LookupError(f"the last layer ran {len(calls)} times")


def heads_for(model: nn.Module, head_type: str, layer: nn.Module) -> list[Head]:
    """What each head computes; ``layer`` is a copy of the base model's last layer."""
    if head_type == "residual":
        weights = [head[0].linear.weight for head in model.auxiliary_heads["default"].heads]
        return [lambda x, args, kwargs, w=w: x + nn.functional.silu(x @ w.T) for w in weights]

    def replay(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        output = layer(x, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    return [replay] * HEADS


def oracle(
    plain: nn.Module, given: dict[str, Tensor], labels: Tensor, heads: list[Head], final_norm: str | None
) -> Tensor:
    """CE_1 as the model computes it, and CE_2 + CE_3 divided by the same count."""
    base = plain.get_base_model()
    layer = base.get_submodule(final_norm) if final_norm else text_layers(base)[-1]
    total, count = call(plain, given | {"labels": labels}).loss, (labels[:, 1:] != -100).sum()
    for k, head in enumerate(heads, start=2):
        with layer_returns(layer, head, bool(final_norm)):
            logits = call(plain, given).logits
        total = total + shifted_cross_entropy(logits, labels, k) / count
    return total


def relative_difference(got: list[Tensor | None], wanted: list[Tensor | None]) -> float:
    """Norm of the difference of all gradients together, over the norm of those wanted."""
    zero = torch.zeros(())
    pairs = [(zero if g is None else g, zero if w is None else w) for g, w in zip(got, wanted, strict=True)]
    return float(sum((g - w).norm() ** 2 for g, w in pairs) ** 0.5 / sum(w.norm() ** 2 for _, w in pairs) ** 0.5)


def outcome(kind: str, model_type: str, head_type: str, final_norm: str | None = None, **fields: Any) -> Outcome:
    """What CAFT does with this class; ``final_norm`` names the module whose output heads read, if not the last layer's input."""
    try:
        return _outcome(kind, model_type, head_type, final_norm, fields)
    except Fails as failure:
        return Outcome(failure.kind, str(failure))


def _outcome(kind: str, model_type: str, head_type: str, final_norm: str | None, fields: dict[str, Any]) -> Outcome:
    with failing_is(NOT_BUILT):
        base = build(kind, model_type)
    try:
        with failing_is(MODEL_FAILS):
            given = inputs_of(kind, base)
            given |= {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
            labels = labels_of(given)
            lora = {"r": 4, "target_modules": lora_targets(base)}
            plain = adapted(build(kind, model_type), LoraConfig(task_type="CAUSAL_LM", **lora))
            if all(g is None for g in gradients(plain, call(plain, given | {"labels": labels}).loss)):
                raise RuntimeError("no gradient reaches the adapters")
    except Fails as failure:
        return _refused_at_once(base, head_type) or Outcome(failure.kind, str(failure))
    layer = copy.deepcopy(text_layers(build(kind, model_type))[-1]).requires_grad_(False).train()
    try:
        model = adapted(build(kind, model_type), CAFTConfig(head_type=head_type, **lora, **OBJECTIVE | fields))
        loss = call(model, given | {"labels": labels}).loss
        got = gradients(model, loss)
    except Exception as error:
        return Outcome(REFUSED if by_name(error, base) else FAULT, said(error))
    with failing_is(FAULT):
        wanted_loss = oracle(plain, given, labels, heads_for(model, head_type, layer), final_norm)
        wanted = gradients(plain, wanted_loss)
    off, gradient_off = relative_difference([loss], [wanted_loss]), relative_difference(got, wanted)
    detail = f"loss {float(loss.detach()):.4f} is off by {off:.0e}, its gradient by {gradient_off:.0e}"
    return Outcome(EQUAL if off < 1e-5 and gradient_off < 1e-4 else FAULT, detail)


def _refused_at_once(base: PreTrainedModel, head_type: str) -> Outcome | None:
    """Refused before a forward pass, which needs inputs that are no business of CAFT."""
    try:
        get_peft_model(base, CAFTConfig(head_type=head_type, target_modules="all-linear", **OBJECTIVE))
    except Exception as error:
        return Outcome(REFUSED, said(error)) if by_name(error, base) else None
    return None


def by_name(error: Exception, model: PreTrainedModel) -> bool:
    """Whether it is a refusal of peft_caft that names the class, or that of its decoder."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    names = {type(module).__name__ for module in (model, model.get_decoder())}
    return (
        isinstance(error, TypeError | ValueError)
        and "/peft_caft/" in raised_in
        and any(name in str(error) for name in names)
    )


def said(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({last.filename.rpartition('/')[2]}, line {last.lineno})"
