"""Memory of training on each device: parameters, whole or sharded, and a step (`simulated_step`).

Assumptions, all about parameters:

- Adapters are fp32, as PEFT makes them, as are gradients and AdamW's two values. Heads are frozen.
- QLoRA: bitsandbytes stores the linear layers in NF4 with double quantisation, and dequantises one
  matrix at a time. Embeddings, lm_head, norms and heads keep the model's dtype, and so do the
  experts of a mixture, which transformers keeps in one tensor of three dimensions.
- DDP: everything is whole. The buckets that are sent hold a copy of the gradients.
- ZeRO-2: parameters are whole, gradients and optimizer states are divided evenly.
- FSDP (full shard): parameters are divided too, but not the constants of 4-bit weights, which are
  no parameters. Each decoder layer is a unit, also one that is a head; two are whole at a time in
  the backward pass, since the next one is fetched early. The lm_head is whole while losses and
  heads are differentiated, or always if it is also the embedding. Everything else outside of the
  layers is always whole, residual heads included, except an embedding of its own (accelerate 1.15).
- ZeRO-3: divided like FSDP, but DeepSpeed keeps up to 10^9 parameters whole
  (``stage3_max_live_parameters``). CAFT's losses hold one more copy of the lm_head. Small
  parameters count as divided, though DeepSpeed keeps them whole
  (``stage3_param_persistence_threshold``). Its buckets are not counted (``reduce_bucket_size``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..heads.backbone import Backbone
from ..method.model import CAFTModel
from .parts import Parts
from .simulated_step import StepMemory

PLACEMENTS = ("one device", "DDP", "ZeRO-2", "FSDP", "ZeRO-3")
# 4 bits; 8 bits for each 64 weights; 32 bits for each 256 of those (arXiv 2305.14314, section 3).
NF4_PACKED, NF4_CONSTANTS = 0.5, 1 / 64 + 4 / (64 * 256)
NF4_BYTES = NF4_PACKED + NF4_CONSTANTS
ADAM_STATES = 2
ZERO3_LIVE_PARAMETERS = 10**9


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's parameters, none of them divided.

    Attributes:
        base: the base model.
        adapter: LoRA.
        heads: the auxiliary heads.
        constants: quantisation constants of 4-bit weights; part of `base`.
        outside: what lies in no decoder layer; part of `base`, `adapter` and `heads`.
        embedding: the embedding, 0 if it is also the lm_head; part of `outside`.
        lm_head: the unembedding, even if it is also the embedding; part of `outside`.
        largest_layer: the base model's largest decoder layer with adapter, without constants.
        head_layer: the largest decoder layer that is a head; 0 if there is none.
        dequantised: the largest matrix that is stored in 4 bits, in the model's dtype; or 0.
        per_weight: one weight that is not quantised.
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
        """Count ``model``, maybe on the meta device; ``quantised``, as QLoRA would load it."""
        backbone = Backbone.of(model)
        layers = list(backbone.layers)
        heads = auxiliary_heads_in(model)
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
        """Bytes of the parameters that a device holds whole at a time, besides its shard of all."""
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
class DeviceMemory(Parts):
    """Bytes on each device at the peak.

    Attributes:
        weights: parameters of the base model.
        adapter: parameters of LoRA.
        gradients: of LoRA, counted as always there; under DDP also their copy in buckets.
        optimizer: AdamW's two states of each LoRA parameter.
        heads: parameters of the auxiliary heads.
        working_weights: what is whole for a moment: gathered parameters, a dequantised matrix.
        activations, head_activations, loss: the fields of `StepMemory`.
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


def device_memory(model: ModelBytes, step: StepMemory, placement: str = "one device", gpus: int = 1) -> DeviceMemory:
    """Memory of each of ``gpus`` devices.

    Args:
        step: what a step needs for the batch of one device.
        placement: one of `PLACEMENTS`.
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
        **asdict(step),
    )


def auxiliary_heads_in(model: PeftModel) -> nn.Module | None:
    """The auxiliary heads of a CAFT model; None for plain LoRA."""
    return model.base_model.auxiliary_heads["default"] if isinstance(model.base_model, CAFTModel) else None


def quantised_weights(backbone: Backbone) -> dict[int, nn.Parameter]:
    """``id(weight)`` -> weight that bitsandbytes quantises: all linear maps but the lm_head."""
    return {
        id(module.weight): module.weight
        for name, module in backbone.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not backbone.lm_head and "lora_" not in name
    }
