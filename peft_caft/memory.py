"""Memory that training takes on each device: what a step needs (`simulated_step`), and parameters, whole or in shards.

Assumptions, all about parameters:

- Adapters are fp32, as PEFT makes them; their gradients too, and AdamW keeps two fp32 values for each. Heads are frozen.
- QLoRA: bitsandbytes NF4 with double quantisation of the linear layers, save the lm_head. Everything else stays in the dtype of
  the model: embeddings, lm_head, norms, heads, and the experts of a mixture, which transformers keeps in one tensor of three
  dimensions. One matrix at a time is dequantised.
- FSDP (full shard): parameters, gradients and optimizer states are divided evenly. What lies outside the decoder layers is one
  unit with residual heads, gathered all the time; each decoder layer is a unit, also as a head, and of these two are whole at a
  time, since the next one is fetched early.
- ZeRO-3: divided in the same way; DeepSpeed keeps parameters whole until 10^9 are (``stage3_max_live_parameters``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from .backbone import Backbone
from .model import CAFTModel
from .simulated_step import StepMemory

PLACEMENTS = ("one device", "FSDP", "ZeRO-3")
# 4 bits; an 8-bit constant for each 64 weights; an fp32 constant for each 256 of those (QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_STATES = 2
ZERO3_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parameters, none of them divided.

    Attributes:
        base: of the base model.
        adapter: of LoRA.
        heads: of the auxiliary heads.
        outside: of base model and heads what lies in no decoder layer.
        largest_layer: of a decoder layer with its adapter, be it the base model's or a head's.
        dequantised: of the largest matrix that is stored in 4 bits; 0 if none is.
        per_weight: of one that is not quantised.
    """

    base: float
    adapter: float
    heads: float
    outside: float
    largest_layer: float
    dequantised: float
    per_weight: int

    @classmethod
    def of(cls, model: PeftModel, quantised: bool = False) -> ModelBytes:
        """Counted from ``model``, which may be on the meta device; ``quantised``: as if it had been loaded for QLoRA."""
        backbone = Backbone.of(model)
        layers = list(backbone.layers)
        heads = _heads(model)
        in_4_bits = _linear_weights(backbone) if quantised else {}

        def size(parameters: Iterable[nn.Parameter]) -> float:
            unique = {id(p): p for p in parameters}
            return sum(p.numel() * (NF4_BYTES if key in in_4_bits else p.element_size()) for key, p in unique.items())

        adapter = [p for name, p in backbone.model.named_parameters() if "lora_" in name]
        base = [p for name, p in backbone.model.named_parameters() if "lora_" not in name]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [p for p in (*base, *adapter) if id(p) not in inside]
        units = [size(layer.parameters()) for layer in layers]
        if heads is not None and heads.config.head_type == "decoder_layer":
            units += [size(layer.parameters()) for head in heads.heads for layer in head]
        elif heads is not None:
            outside += list(heads.parameters())
        per_weight = backbone.lm_head.weight.element_size()
        return cls(
            base=size(base),
            adapter=size(adapter),
            heads=0 if heads is None else size(heads.parameters()),
            outside=size(outside),
            largest_layer=max(units),
            dequantised=max((p.numel() * per_weight for p in in_4_bits.values()), default=0),
            per_weight=per_weight,
        )

    def gathered(self, placement: str) -> float:
        """Bytes of the parameters that are whole on every device at a time, beside its shard of all."""
        if placement == "FSDP":
            return self.outside + 2 * self.largest_layer
        if placement == "ZeRO-3":
            return min(self.base + self.adapter + self.heads, ZERO3_LIVE_PARAMETERS * self.per_weight)
        return 0.0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device at the moment at which most are needed.

    Attributes:
        weights: of the base model.
        adapter: LoRA's parameters.
        gradients: of these, counted as if they were there all the time, as they are while gradients are accumulated.
        optimizer: AdamW's two states for each.
        heads: the auxiliary heads' parameters.
        working_weights: parameters that are whole for a moment: gathered ones, and a dequantised matrix.
        activations, head_activations, loss: see `StepMemory`.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float
    heads: float
    working_weights: float
    activations: float
    head_activations: float
    loss: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def device_memory(model: ModelBytes, step: StepMemory, placement: str = "one device", gpus: int = 1) -> DeviceMemory:
    """Memory of each device.

    Args:
        model: its parameters.
        step: what a step needs with the batch of one device.
        placement: of `PLACEMENTS`; ``"one device"`` also stands for copies of the model on several ones (DDP).
        gpus: over how many devices the parameters are divided.
    """
    shards = 1 if placement == "one device" else gpus
    return DeviceMemory(
        weights=model.base / shards,
        adapter=model.adapter / shards,
        gradients=model.adapter / shards,
        optimizer=ADAM_STATES * model.adapter / shards,
        heads=model.heads / shards,
        working_weights=model.gathered(placement) + model.dequantised,
        activations=step.activations,
        head_activations=step.head_activations,
        loss=step.loss,
    )


def _heads(model: PeftModel) -> nn.Module | None:
    return model.base_model.auxiliary_heads["default"] if isinstance(model.base_model, CAFTModel) else None


def _linear_weights(backbone: Backbone) -> dict[int, nn.Parameter]:
    """Weights that bitsandbytes quantises, by their identity: those of all linear maps but the lm_head."""
    return {
        id(module.weight): module.weight
        for name, module in backbone.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not backbone.lm_head and "lora_" not in name
    }
