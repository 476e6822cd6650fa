"""Memory of one training step of LoRA or CAFT, from a model's configuration alone.

The real code of transformers, PEFT and this package runs on tensors without data (`Simulation`): so
nothing is assumed about an architecture, and a change of that code shows here.
"""

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
from .parts import Parts

ACTIVATIONS, HEAD_ACTIVATIONS, LOSS = "activations", "head_activations", "loss"


@dataclass(frozen=True)
class StepMemory(Parts):
    """Bytes at the peak of a training step, without parameters, gradients and optimizer.

    Attributes:
        activations: what layers and adapters keep for the backward pass or work with.
        head_activations: tensors of the auxiliary heads, with dL/dh of their losses.
        loss: logits, log-probabilities and their gradients.
    """

    activations: int = 0
    head_activations: int = 0
    loss: int = 0


@dataclass(frozen=True)
class Batch:
    """What a device computes at a time: rows of equal length, whose last tokens are supervised.

    Attributes:
        tokens: length of each row.
        supervised: s, share of the tokens that have a label.
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
    """A model with an adapter, ready to train, on the meta device.

    Args:
        peft_config: a `CAFTConfig` with fresh heads, or a ``LoraConfig``.
        dtype: dtype of the base model; PEFT keeps the adapter in fp32.
        attention: ``"sdpa"`` or ``"eager"``; None takes transformers' default.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of fresh heads, which are meant here
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
    """Simulate forward and backward pass of a training step that adds to gradients (accumulation).

    Args:
        model: result of `model_on_meta`; its tensors become fake, and it can be simulated again.
        gradient_checkpointing: run each layer once more in the backward pass.
        autocast: run under bfloat16 autocast, as ``TrainingArguments(bf16=True)`` does.
        device: ``"cuda"`` or ``"cpu"``, on which the size of a chunk of logits depends.
        sharded_heads: let the heads count as divided by an engine (`sharding.is_sharded`): they
            compute all tokens, and keep their activations until the base model's backward pass.
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
            parameter.ds_id = None  # DeepSpeed's mark, which `is_sharded` looks for
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with phase.followed(), chunks_as_on(device), simulation:
        with precision:
            loss = model(**batch.arguments()).loss
        loss.backward()
    return StepMemory(**simulation.at_peak)


class _Phase:
    """Knows a new tensor's kind by where the step is: in the layers, or between their passes."""

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
        if not torch.is_grad_enabled():  # a pass before the step, by which `Backbone` knows the model
            return
        self._in_trunk = False
        output["last_hidden_state"].register_hook(self._back_in_trunk)

    def _back_in_trunk(self, grad: Tensor) -> None:
        self._in_trunk = True
