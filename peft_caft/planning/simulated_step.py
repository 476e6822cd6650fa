"""Memory of one training step, LoRA's or CAFT's, from a model's configuration alone.

The step itself is run, with all the code of transformers, PEFT and this package, on tensors without
data (`Simulation`). So nothing about an architecture is assumed here, and what changes there
changes here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..heads.backbone import Backbone
from ..heads.unembedding import chunks_as_on
from ..method.model import CAFTModel
from ..method.targets import IGNORE_INDEX
from .live_memory import Simulation

ACTIVATIONS, HEAD_ACTIVATIONS, LOSS = "activations", "head_activations", "loss"


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment of a training step at which most are needed, without parameters,
    gradients and optimizer.

    Attributes:
        activations: what the base model's layers, with their adapters, keep for the backward pass
            or just work with.
        head_activations: the same of auxiliary heads, with dL/dh of their losses.
        loss: logits, log-probabilities and gradients of them.
    """

    activations: int = 0
    head_activations: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.head_activations + self.loss


@dataclass(frozen=True)
class Batch:
    """What one device computes at a time: rows of equal length without padding, whose last tokens
    are supervised.

    Attributes:
        rows: number of rows.
        tokens: of each row.
        supervised: s, share of the tokens with a label.
    """

    rows: int
    tokens: int
    supervised: float = 1.0

    def arguments(self) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 ``(rows, tokens)``."""
        input_ids = torch.zeros(self.rows, self.tokens, dtype=torch.int64)
        labels = input_ids.clone()
        labels[:, : self.tokens - round(self.supervised * self.tokens)] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


def model_on_meta(
    config: PretrainedConfig, peft_config: LoraConfig, dtype: torch.dtype, attention: str | None = None
) -> PeftModel:
    """A model with an adapter, ready to train, without weights.

    Args:
        config: of the base model.
        peft_config: a `CAFTConfig` with fresh heads, or a ``LoraConfig``.
        dtype: of the base model; PEFT keeps the adapter in fp32.
        attention: ``"sdpa"`` or ``"eager"``; None takes what transformers takes.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # fresh heads are meant
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        base.config.get_text_config().use_cache = False  # as Trainer has it
        return get_peft_model(base, peft_config).train()


def simulate_step(
    model: PeftModel,
    batch: Batch,
    gradient_checkpointing: bool = False,
    autocast: bool = False,
    device: str = "cuda",
    sharded_heads: bool = False,
) -> StepMemory:
    """Simulate forward and backward pass of a training step, when gradients are there already
    (accumulation).

    Args:
        model: from `model_on_meta`; its tensors become fake ones, and it can be simulated again.
        batch: what is trained on.
        gradient_checkpointing: keep the layers' inputs alone and run each layer once more in the
            backward pass.
        autocast: in bfloat16, as ``TrainingArguments(bf16=True)`` does.
        device: ``"cuda"`` or ``"cpu"``, on which the size of a chunk of logits depends.
        sharded_heads: as where an engine divides the heads' parameters (`sharding.is_sharded`):
            heads then compute all tokens, and keep what their backward pass needs until the base
            model's.
    """
    base = model.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name in transformers 6
        if gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        elif base.is_gradient_checkpointing:
            base.gradient_checkpointing_disable()
    phase = _Phase(Backbone.of(base), isinstance(model.base_model, CAFTModel))
    simulation = Simulation(phase.kind_of)
    simulation.take_over(model)
    if sharded_heads and isinstance(model.base_model, CAFTModel):
        for parameter in model.base_model.auxiliary_heads.parameters():
            parameter.ds_id = None  # DeepSpeed's mark
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with phase.followed(), chunks_as_on(device), simulation:
        with precision:
            loss = model(**batch.arguments()).loss
        loss.backward()
    return StepMemory(**simulation.at_peak)


class _Phase:
    """Where a step is, so that new tensors can be told apart: in the base model, or between its
    forward and backward pass.
    """

    def __init__(self, backbone: Backbone, has_heads: bool) -> None:
        self._trunk = backbone.trunk
        self._vocab_size = backbone.vocab_size
        self._others = HEAD_ACTIVATIONS if has_heads else LOSS
        self._in_trunk = True

    def kind_of(self, tensor: Tensor) -> str:
        if self._in_trunk:
            return ACTIVATIONS
        return LOSS if self._vocab_size in tensor.shape else self._others

    @contextmanager
    def followed(self) -> Iterator[None]:
        hook = self._trunk.register_forward_hook(self._after_trunk)
        try:
            yield
        finally:
            hook.remove()

    def _after_trunk(self, module: torch.nn.Module, args: tuple, output: dict) -> None:
        self._in_trunk = False
        output["last_hidden_state"].register_hook(self._back_in_trunk)

    def _back_in_trunk(self, grad: Tensor) -> None:
        self._in_trunk = True
