"""Bytes that each device sends in a training step, computed from the sizes of parameters.

A step is one forward and one backward pass on every device, and an update. In a ring, each of N
devices sends B (N - 1) / N to gather B bytes everywhere, or to sum them and leave each device its
part; to sum them everywhere, twice that. So nothing depends on the batch. Assumptions:

- DDP sums the adapter's gradients on all devices.
- ZeRO-2 sums them like DDP (``use_multi_rank_bucket_allreduce``), and gathers the updated adapter.
- FSDP: FSDP2 as accelerate 1.15 wraps a model and as `examples/accelerate/fsdp2.yaml` sets it, with
  ``reshard_after_forward``. Units are each decoder layer, also one that is a head, the embedding,
  the lm_head (one unit if they share a weight), and the rest. Every unit is gathered in the forward
  pass; layers and the embedding (fetched ahead though nothing needs it) again in the backward pass,
  where gradient checkpointing computes a layer again while it is whole. Each parameter is cut along
  its first dimension and filled up to a multiple of N: a LoRA of rank r < N is sent as one of rank
  N. Gradients are summed in parts. Not counted: where accelerate finds the final norm, as in GPT-2,
  it is in the lm_head's unit, which CAFT gathers again.
- ZeRO-3: every parameter is gathered forward, and all but the embedding backward. CAFT's losses use
  the lm_head outside of its module, and gather it once more. An upper limit: DeepSpeed keeps what
  it needs again within 10^9 parameters (``stage3_max_reuse_distance``), with checkpointing too, and
  does not divide small parameters.
- Base model and heads travel in their dtype, adapters and gradients in fp32 (under DeepSpeed with
  its ``bf16`` and ``fp16`` off). QLoRA sends 4 bits. Buffers and single numbers do not count.

`benchmarks/scale.py` and `tests/planning/test_communication.py` compare this with the collectives
that torch and accelerate call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from ..heads.backbone import Backbone
from .memory import NF4_PACKED, auxiliary_heads_in, quantised_weights
from .parts import Parts


@dataclass(frozen=True)
class Gathered:
    """Bytes of parameters, padded to whole shards, by the unit in which they are gathered.

    Attributes:
        layers: the base model's decoder layers with their adapters.
        head_layers: decoder layers that are heads.
        embedding: the embedding of the tokens; 0 if the lm_head shares its weight.
        lm_head: the unembedding.
        rest: residual heads, norms, and whatever else lies in no decoder layer.
        trained: the parameters that get a gradient; part of the others.
    """

    layers: float
    head_layers: float
    embedding: float
    lm_head: float
    rest: float
    trained: float

    @classmethod
    def of(cls, model: PeftModel, quantised: bool = False, shards: int = 1) -> Gathered:
        """Count the parameters of ``model``, which may be on the meta device.

        Args:
            quantised: count the base model as QLoRA would load it.
            shards: fill up the first dimension of every parameter to a multiple of this.
        """
        backbone = Backbone.of(model)
        in_4_bits = quantised_weights(backbone) if quantised else {}
        counted: set[int] = set()

        def size(parameters: Iterable[nn.Parameter]) -> float:
            """Bytes of the parameters that no earlier call has counted."""
            new = {id(p): p for p in parameters if id(p) not in counted}
            counted.update(new)
            return sum(p.numel() * NF4_PACKED if k in in_4_bits else _filled_up(p, shards) for k, p in new.items())

        heads = auxiliary_heads_in(model)
        head_layers = list(heads.parameters()) if heads is not None and heads.config.head_type != "residual" else []
        return cls(
            layers=size(backbone.layers.parameters()),
            head_layers=size(head_layers),
            lm_head=size(backbone.model.get_output_embeddings().parameters()),
            embedding=size(backbone.model.get_input_embeddings().parameters()),
            rest=size(model.parameters()),
            trained=sum(_filled_up(p, shards) for p in model.parameters() if p.requires_grad),
        )

    @property
    def total(self) -> float:
        return self.layers + self.head_layers + self.embedding + self.lm_head + self.rest


@dataclass(frozen=True)
class Communication(Parts):
    """Bytes that each device sends in a step.

    Attributes:
        forward, backward: sent to gather parameters for the pass.
        gradients: sent to sum gradients.
        update: sent to gather updated parameters.
    """

    forward: float = 0.0
    backward: float = 0.0
    gradients: float = 0.0
    update: float = 0.0


def communication(model: PeftModel, placement: str, gpus: int, quantised: bool = False) -> Communication:
    """What each of ``gpus`` devices sends in a step with ``model``, maybe on the meta device.

    Args:
        placement: one of `memory.PLACEMENTS`; on one device nothing is sent.
        quantised: count the base model as QLoRA would load it.
    """
    sent = (gpus - 1) / gpus
    if placement == "one device":
        return Communication()
    if placement in ("DDP", "ZeRO-2"):
        trained = Gathered.of(model, quantised).trained
        return Communication(gradients=2 * trained * sent, update=trained * sent if placement == "ZeRO-2" else 0.0)
    parts = Gathered.of(model, quantised, shards=gpus if placement == "FSDP" else 1)
    forward, backward = parts.total, parts.layers + parts.head_layers + parts.embedding
    if placement == "ZeRO-3":
        backward = parts.total - parts.embedding
        if auxiliary_heads_in(model) is not None:
            forward += parts.lm_head
    return Communication(forward * sent, backward * sent, parts.trained * sent)


def _filled_up(parameter: nn.Parameter, shards: int) -> float:
    """Bytes of a parameter whose first dimension is filled up to a multiple of ``shards``."""
    if parameter.numel() == 0 or parameter.dim() == 0:
        return parameter.numel() * parameter.element_size()
    rows = parameter.shape[0]
    return parameter.numel() // rows * math.ceil(rows / shards) * shards * parameter.element_size()
