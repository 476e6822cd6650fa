"""Memory that training takes on each device: what a step needs (`simulated_step`), and parameters,
whole or in shards.

Assumptions, all about parameters:

- Adapters are fp32, as PEFT makes them; their gradients too, and AdamW keeps two fp32 values for
  each. Heads are frozen.
- QLoRA: bitsandbytes NF4 with double quantisation of the linear layers, save the lm_head.
  Everything else stays in the dtype of the model: embeddings, lm_head, norms, heads (`layer_copy`
  dequantises the layer of which it makes one), and the experts of a mixture, which transformers
  keeps in one tensor of three dimensions. One matrix at a time is dequantised.
- DDP: everything whole, and a copy of the gradients in the buckets that are sent (torch's
  ``gradient_as_bucket_view=False``).
- ZeRO-2: gradients and optimizer states are divided evenly, parameters are whole.
- FSDP (full shard): parameters are divided too, save the constants of 4-bit weights, which are no
  parameters. Each decoder layer is a unit, also as a head, and of these two are whole at a time in
  the backward pass, since the next one is fetched early. The lm_head is while the losses and heads
  are differentiated, or all the time if it is also the embedding; what else lies in no layer, with
  residual heads, all the time; an embedding of its own is not (accelerate 1.15).
- ZeRO-3: divided in the same way; DeepSpeed keeps parameters whole until 10^9 are
  (``stage3_max_live_parameters``). The losses of CAFT have a copy of the lm_head besides. Small
  parameters, which it does not divide, are counted as if it did
  (``stage3_param_persistence_threshold``); its buckets are not counted (``reduce_bucket_size``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..heads.backbone import Backbone
from ..method.model import CAFTModel
from .simulated_step import StepMemory

PLACEMENTS = ("one device", "DDP", "ZeRO-2", "FSDP", "ZeRO-3")
# 4 bits; an 8-bit constant for each 64 weights; an fp32 constant for each 256 of those (QLoRA,
# arXiv 2305.14314, section 3).
NF4_PACKED, NF4_CONSTANTS = 0.5, 1 / 64 + 4 / (64 * 256)
NF4_BYTES = NF4_PACKED + NF4_CONSTANTS
ADAM_STATES = 2
ZERO3_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parameters, none of them divided.

    Attributes:
        base: of the base model.
        adapter: of LoRA.
        heads: of the auxiliary heads.
        constants: of the base model's bytes those of the constants that belong to 4-bit weights.
        outside: of base model, adapter and heads what lies in no decoder layer.
        embedding: of that an embedding that is not also the lm_head.
        lm_head: of that the unembedding, be it also the embedding.
        largest_layer: of a decoder layer of the base model with its adapter, without constants.
        head_layer: of one that is a head; 0 if none is.
        dequantised: of the largest matrix that is stored in 4 bits; 0 if none is.
        per_weight: of one that is not quantised.
    """

    base: float
    adapter: float
    heads: float
    constants: float
    outside: float
    embedding: float
    lm_head: float
    largest_layer: float
    head_layer: float
    dequantised: float
    per_weight: int

    @classmethod
    def of(cls, model: PeftModel, quantised: bool = False) -> ModelBytes:
        """Counted from ``model``, which may be on the meta device; ``quantised``: as if it had been
        loaded for QLoRA.
        """
        backbone = Backbone.of(model)
        layers = list(backbone.layers)
        heads = heads_of(model)
        in_4_bits = quantised_weights(backbone) if quantised else {}

        def size(parameters: Iterable[nn.Parameter]) -> float:
            unique = {id(p): p for p in parameters}
            return sum(p.numel() * (NF4_PACKED if key in in_4_bits else p.element_size()) for key, p in unique.items())

        adapter = [p for name, p in backbone.model.named_parameters() if "lora_" in name]
        base = [p for name, p in backbone.model.named_parameters() if "lora_" not in name]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [p for p in (*base, *adapter) if id(p) not in inside]
        head_layers = []
        if heads is not None and heads.config.head_type == "decoder_layer":
            head_layers = [layer for head in heads.heads for layer in head]
        elif heads is not None:
            outside += list(heads.parameters())
        per_weight = backbone.lm_head.weight.element_size()
        constants = NF4_CONSTANTS * sum(p.numel() for p in in_4_bits.values())
        embedding = backbone.model.get_input_embeddings().weight
        return cls(
            base=size(base) + constants,
            adapter=size(adapter),
            heads=0 if heads is None else size(heads.parameters()),
            constants=constants,
            outside=size(outside),
            embedding=0 if embedding is backbone.lm_head.weight else size([embedding]),
            lm_head=size([backbone.lm_head.weight]),
            largest_layer=max(size(layer.parameters()) for layer in layers),
            head_layer=max((size(layer.parameters()) for layer in head_layers), default=0),
            dequantised=max((p.numel() * per_weight for p in in_4_bits.values()), default=0),
            per_weight=per_weight,
        )

    def gathered(self, placement: str) -> float:
        """Bytes of the parameters that are whole on every device at a time, beside its shard of
        all.
        """
        if placement == "FSDP":
            layers = 2 * self.largest_layer
            if self.embedding:  # else the lm_head, as embedding, stays whole
                layers = max(layers - self.lm_head, self.largest_layer)
            return self.outside - self.embedding + max(layers, 2 * self.head_layer)
        if placement == "ZeRO-3":
            live = min(self.base + self.adapter + self.heads, ZERO3_LIVE_PARAMETERS * self.per_weight)
            return live + (self.lm_head if self.heads else 0.0)
        return 0.0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device at the moment at which most are needed.

    Attributes:
        weights: of the base model.
        adapter: LoRA's parameters.
        gradients: of these, counted as if they were there all the time, as they are while gradients
            are accumulated; under DDP also their copy in buckets.
        optimizer: AdamW's two states for each.
        heads: the auxiliary heads' parameters.
        working_weights: parameters that are whole for a moment: gathered ones, and a dequantised
            matrix.
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
        placement: of `PLACEMENTS`.
        gpus: number of devices.
    """
    of_states = gpus if placement in ("ZeRO-2", "FSDP", "ZeRO-3") else 1
    of_parameters = gpus if placement in ("FSDP", "ZeRO-3") else 1
    return DeviceMemory(
        weights=(model.base - model.constants) / of_parameters + model.constants,
        adapter=model.adapter / of_parameters,
        gradients=model.adapter / of_states * (2 if placement == "DDP" else 1),
        optimizer=ADAM_STATES * model.adapter / of_states,
        heads=model.heads / of_parameters,
        working_weights=model.gathered(placement) + model.dequantised,
        activations=step.activations,
        head_activations=step.head_activations,
        loss=step.loss,
    )


def heads_of(model: PeftModel) -> nn.Module | None:
    """The auxiliary heads of a CAFT model."""
    return model.base_model.auxiliary_heads["default"] if isinstance(model.base_model, CAFTModel) else None


def quantised_weights(backbone: Backbone) -> dict[int, nn.Parameter]:
    """Weights that bitsandbytes quantises, by their identity: those of all linear maps but the
    lm_head.
    """
    return {
        id(module.weight): module.weight
        for name, module in backbone.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not backbone.lm_head and "lora_" not in name
    }
