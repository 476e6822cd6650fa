"""``peft-caft plan``: what training with LoRA and CAFT would take, from a configuration alone."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import PretrainedConfig

from ..basics.checkpoints import load_config
from ..basics.hub_errors import first_line
from ..heads.backbone import Backbone
from ..heads.config import HEAD_TYPES
from ..method.config import target_modules
from ..method.model import CAFTConfig
from .communication import Communication, communication
from .flops import ModelShapes, caft_step, lora_step, number_of_experts
from .memory import PLACEMENTS, DeviceMemory, ModelBytes, device_memory
from .settings import PlanSettings
from .simulated_step import Batch, StepMemory, model_on_meta, simulate_step

METHODS = ("lora", *HEAD_TYPES)
GIB = 2**30
RESERVED_BYTES = 0.5 * GIB  # CUDA and its libraries
LOST_SHARE = 0.05  # of the memory in use: lost between the allocator's blocks


def peft_config(settings: PlanSettings, method: str) -> LoraConfig:
    """LoRA's configuration, or CAFT's with fresh heads of the type that ``method`` names."""
    lora: dict[str, Any] = {
        "r": settings.r,
        "target_modules": target_modules(settings.target_modules),
        "task_type": "CAUSAL_LM",
    }
    if method == "lora":
        return LoraConfig(**lora)
    return CAFTConfig(
        **lora,
        head_type=method,  # type: ignore[arg-type]
        num_auxiliary_heads=settings.num_auxiliary_heads,
        head_num_layers=settings.head_num_layers,
        aux_token_fraction=settings.aux_token_fraction,
        aux_loss_schedule="constant",
    )


@dataclass(frozen=True)
class Cost:
    """Operations of a step.

    Attributes:
        method: one of `METHODS`.
        aux_token_fraction: p; None for LoRA.
        flops: operations per token of the batch, supervised or not.
        over_lora: flops over those of LoRA with transformers' loss, minus 1.
        over_skipping_lora: the same over a LoRA that computes logits of tokens with a label alone.
        over_lora_checkpointing: ``over_lora``, both with gradient checkpointing.
    """

    method: str
    aux_token_fraction: float | None
    flops: float
    over_lora: float
    over_skipping_lora: float
    over_lora_checkpointing: float


@dataclass(frozen=True)
class Option:
    """One way to train, with the memory on each GPU and the bytes that each GPU sends in a step."""

    method: str
    placement: str
    qlora: bool
    gradient_checkpointing: bool
    memory: DeviceMemory
    communication: Communication

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits ``gpu_memory`` GiB, beside CUDA and what the allocator cannot use."""
        return self.memory.total * (1 + LOST_SHARE) + RESERVED_BYTES <= gpu_memory * GIB


@dataclass(frozen=True)
class Plan:
    """Result of `plan`.

    Attributes:
        facts: class, sizes and attention of the model, and versions.
        parameters: number of parameters of base model, adapter and either type of heads.
        costs: LoRA, and each head type with all supervised positions and with a share of them.
        options: every way to train that was asked for.
        notes: what is peculiar about this model or these settings.
    """

    settings: PlanSettings
    facts: dict[str, Any]
    parameters: dict[str, int]
    costs: list[Cost]
    options: list[Option]
    notes: list[str]

    def to_json(self) -> str:
        """The whole plan; memory and communication in bytes, ``gpu_memory`` in GiB."""
        record = asdict(self)
        for entry, option in zip(record["options"], self.options, strict=True):
            entry["memory"]["total"] = option.memory.total
            entry["communication"]["total"] = option.communication.total
            if self.settings.gpu_memory is not None:
                entry["fits"] = option.fits(self.settings.gpu_memory)
        return json.dumps(record, indent=2) + "\n"


def plan(settings: PlanSettings) -> Plan:
    """Count parameters and operations, and simulate the memory of steps, which takes seconds each.

    Raises:
        FileNotFoundError: if there is no such model.
        PermissionError, ConnectionError: if the Hub refuses it or cannot be reached.
        TypeError: if it is no decoder-only causal language model.
        ValueError: if a setting does not fit it, or its step cannot be simulated.
    """
    config = load_config(settings.model)
    models = {method: _model(config, settings, method) for method in METHODS}
    backbone = Backbone.of(models["lora"])
    with _explained(backbone):
        costs = _costs(ModelShapes.of(models["lora"]), settings)
    batch = Batch(settings.batch_size, settings.tokens, settings.supervised)
    can_checkpoint = getattr(backbone.model, "supports_gradient_checkpointing", False)
    placements = PLACEMENTS[1:] if settings.gpus > 1 else PLACEMENTS[:1]
    steps: dict[tuple[str, bool, bool], StepMemory] = {}
    for method, model in models.items():
        for sharded in sorted({_shards_heads(placement, method) for placement in placements}):
            for checkpointing in (False, True) if can_checkpoint else (False,):
                with _explained(backbone):
                    steps[method, checkpointing, sharded] = simulate_step(
                        model, batch, checkpointing, settings.autocast, settings.device, sharded
                    )
    options = [
        Option(
            method,
            placement,
            qlora,
            checkpointing,
            device_memory(ModelBytes.of(models[method], qlora), step, placement, settings.gpus),
            communication(models[method], placement, settings.gpus, qlora),
        )
        for placement in placements
        for qlora in (False, True)
        for (method, checkpointing, sharded), step in steps.items()
        if sharded == _shards_heads(placement, method)
    ]
    notes = _notes(backbone, config, settings, can_checkpoint)
    return Plan(settings, _facts(backbone), _parameters(models), costs, options, notes)


def _shards_heads(placement: str, method: str) -> bool:
    """Whether heads are sharded in a forward pass; FSDP shards those that are their own units."""
    return method != "lora" and (placement == "ZeRO-3" or (placement == "FSDP" and method == "decoder_layer"))


def _model(config: PretrainedConfig, settings: PlanSettings, method: str) -> PeftModel:
    try:
        return model_on_meta(config, peft_config(settings, method), getattr(torch, settings.dtype), settings.attention)
    except ValueError as error:
        name = type(config).__name__
        if "Unrecognized configuration class" in str(error):
            raise TypeError(
                f"model: got {name}, of which transformers makes no causal language model. Expected a decoder-only model, such "
                "as AutoModelForCausalLM returns."
            ) from error
        if "arget module" in str(error):
            raise ValueError(
                f"target_modules: got {settings.target_modules!r}, expected 'all-linear' or names of modules in this model, "
                f"with commas ({first_line(error)})"
            ) from error
        raise


@contextmanager
def _explained(backbone: Backbone) -> Iterator[None]:
    """Turn errors of counting or simulating an unusual architecture into one ValueError."""
    try:
        yield
    except (RuntimeError, NotImplementedError, LookupError, AttributeError) as error:
        raise ValueError(
            f"model: a training step of {type(backbone.model).__name__} could not be simulated ({type(error).__name__}: "
            f"{first_line(error)}). Expected a model that trains with these settings; other --target-modules or another "
            "--attention may help. If it does train, please report it."
        ) from error


def _facts(backbone: Backbone) -> dict[str, Any]:
    return {
        "class": type(backbone.model).__name__,
        "layers": len(backbone.layers),
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "attention": backbone.model.config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _parameters(models: dict[str, PeftModel]) -> dict[str, int]:
    lora = list(models["lora"].named_parameters())
    heads = {m: models[m].base_model.auxiliary_heads["default"].parameters() for m in HEAD_TYPES}
    return {
        "base": sum(p.numel() for name, p in lora if "lora_" not in name),
        "adapter": sum(p.numel() for name, p in lora if "lora_" in name),
        **{f"{head_type}_heads": sum(p.numel() for p in parameters) for head_type, parameters in heads.items()},
    }


def _costs(shapes: ModelShapes, settings: PlanSettings) -> list[Cost]:
    keys, s = settings.tokens / 2, settings.supervised
    sampled = settings.aux_token_fraction if settings.aux_token_fraction < 1 else 0.25

    def flops(method: str, p: float | None, checkpointing: bool = False) -> float:
        if p is None:
            return lora_step(shapes, keys, gradient_checkpointing=checkpointing).total
        heads = settings.num_auxiliary_heads
        return caft_step(shapes, keys, method, heads, s, p, checkpointing, settings.head_num_layers).total

    plain, checkpointed = flops("lora", None), flops("lora", None, True)
    skipping = lora_step(shapes, keys, s).total
    cases = [("lora", None), *((head_type, p) for head_type in HEAD_TYPES for p in (1.0, sampled))]
    return [
        Cost(
            method,
            p,
            flops=(total := flops(method, p)),
            over_lora=total / plain - 1,
            over_skipping_lora=total / skipping - 1,
            over_lora_checkpointing=flops(method, p, True) / checkpointed - 1,
        )
        for method, p in cases
    ]


def _notes(backbone: Backbone, config: PretrainedConfig, settings: PlanSettings, can_checkpoint: bool) -> list[str]:
    notes = []
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and settings.tokens > longest:
        notes.append(f"tokens: {settings.tokens} is more than the model's max_position_embeddings, {longest}.")
    if getattr(config, "quantization_config", None):
        notes.append(
            "The checkpoint is quantised; this plan is for the same model loaded unquantised, or quantised anew (QLoRA)."
        )
    if number_of_experts(config.get_text_config()):
        notes.append(
            "A mixture of experts: all experts' weights count for memory, the active ones for operations. QLoRA leaves experts "
            "unquantised, since transformers keeps them in tensors of three dimensions."
        )
    if not can_checkpoint:
        notes.append(f"{type(backbone.model).__name__} does not support gradient checkpointing.")
    return notes
