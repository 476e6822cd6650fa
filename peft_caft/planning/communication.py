"""Bytes that each device sends in a training step on several of them: arithmetic, from the sizes of
parameters.

A step is one forward and one backward pass on every device, and an update. Rings: to gather B bytes
on all of N devices, or to sum them and leave each device its part, each device sends B (N - 1) / N;
to sum them on all devices, twice that. So nothing depends on the batch. Assumptions:

- DDP sums the adapter's gradients, fp32, on all devices.
- ZeRO-2 does so too (DeepSpeed's ``use_multi_rank_bucket_allreduce``, the default), keeps a part,
  and gathers the updated adapter.
- FSDP: FSDP2 as accelerate 1.15 wraps a model and as `examples/accelerate/fsdp2.yaml` sets it, with
  ``reshard_after_forward``. Units of their own are each decoder layer, also one that is a head, the
  embedding and the lm_head; what is left, with residual heads and the final norm, is the root.
  Every unit is gathered in the forward pass. Layers and the embedding (fetched ahead though nothing
  needs it) are gathered again in the backward pass, with and without gradient checkpointing, which
  computes a layer again while it is whole. Embedding and lm_head that share a weight are one unit,
  gathered once. Each parameter is cut along its first dimension, and filled up to a multiple of N:
  a LoRA of rank r < N is sent as one of rank N. Gradients are summed in parts. Not counted: in
  GPT-2, and where else accelerate finds the final norm, that is in the lm_head's unit, which CAFT
  gathers again.
- ZeRO-3: every parameter is gathered forward, and all but the embedding backward; the lm_head once
  more for the losses of CAFT, which need it outside of its module. That is the most: DeepSpeed
  keeps what it needs again within 10^9 parameters (``stage3_max_reuse_distance``), which is also
  why checkpointing adds nothing, and small parameters are not divided.
- Base model and heads travel in their dtype, adapters and gradients in fp32 (under DeepSpeed with
  its ``bf16`` and ``fp16`` off). QLoRA: the packed 4 bits. Not counted: buffers, the gradient norm
  and other single numbers.

`benchmarks/scale.py` and `tests/test_communication.py` compare this with the collectives that torch
and accelerate call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from peft import PeftModel
from torch import nn

from ..heads.backbone import Backbone
from .memory import NF4_PACKED, heads_of, quantised_weights


@dataclass(frozen=True)
class Gathered:
    """Bytes of parameters by the time at which they have to be whole, with what they are filled up
    with.

    Attributes:
        layers: the base model's decoder layers with their adapters.
        head_layers: decoder layers that are heads.
        embedding: of the tokens; 0 if the lm_head shares its weight.
        lm_head: the unembedding.
        rest: residual heads, norms, and whatever else lies in no decoder layer.
        trained: of all these what gets a gradient.
    """

    layers: float
    head_layers: float
    embedding: float
    lm_head: float
    rest: float
    trained: float

    @classmethod
    def of(cls, model: PeftModel, quantised: bool = False, shards: int = 1) -> Gathered:
        """Counted from ``model``, which may be on the meta device.

        Args:
            model: with its adapter, and heads if it has any.
            quantised: as if it had been loaded for QLoRA.
            shards: fill up the first dimension of every parameter to a multiple of this.
        """
        backbone = Backbone.of(model)
        in_4_bits = quantised_weights(backbone) if quantised else {}
        counted: set[int] = set()

        def size(parameters: Iterable[nn.Parameter]) -> float:
            """Of those that no earlier call has counted."""
            total = 0.0
            for p in parameters:
                if id(p) in counted:
                    continue
                counted.add(id(p))
                if id(p) in in_4_bits:
                    total += p.numel() * NF4_PACKED
                else:
                    total += _filled_up(p, shards)
            return total

        heads = heads_of(model)
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
class Communication:
    """Bytes that each device sends in a step.

    Attributes:
        forward: to gather parameters for the forward pass.
        backward: to gather them again.
        gradients: to sum gradients.
        update: to gather updated parameters.
    """

    forward: float = 0.0
    backward: float = 0.0
    gradients: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def communication(model: PeftModel, placement: str, gpus: int, quantised: bool = False) -> Communication:
    """What each device sends in a step with ``model``.

    Args:
        model: as for `Gathered.of`.
        placement: of `memory.PLACEMENTS`; on one device nothing is sent.
        gpus: number of devices, N.
        quantised: as if it had been loaded for QLoRA.
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
        if heads_of(model) is not None:
            forward += parts.lm_head
    return Communication(forward * sent, backward * sent, parts.trained * sent)


def _filled_up(parameter: nn.Parameter, shards: int) -> float:
    """Bytes of a parameter whose first dimension is filled up to a multiple of ``shards``."""
    if parameter.numel() == 0 or parameter.dim() == 0:
        return parameter.numel() * parameter.element_size()
    rows = parameter.shape[0]
    return parameter.numel() // rows * math.ceil(rows / shards) * shards * parameter.element_size()
