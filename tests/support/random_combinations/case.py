"""`Case`: a readable description of one training step, and `Draw`, from which it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any

MIXTURES = {"Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS", "Qwen3-Next"}
HALF = {"bf16 base", "fp16 base", "bf16", "bf16 autocast", "bf16 base, bf16 autocast", "fp16 autocast"}


@dataclass(frozen=True)
class Case:
    """One optimizer step of one model. ``str`` leaves out what has its default."""

    seed: int
    architecture: str = "Llama 2, Llama 3"
    attention: str = "eager"
    layers: int = 2
    tied: bool | None = None  # None: as the architecture has it
    router_loss: bool = False
    method: str = "lora"
    peft: dict[str, Any] = field(default_factory=dict)
    adapters: str = "one"
    freeze_unembedding: bool = False
    frozen_base: str = ""  # parameters that full fine-tuning leaves out
    unfrozen_base: str = ""  # parameters that train beside adapters
    heads: int = 2
    head_type: str = "decoder_layer"
    head_input: str = "last_layer_input"
    head_layers: int = 1
    head_files: str = ""  # how the heads in a folder differ from fresh ones
    train_heads: str = "frozen"
    precision: str = "fp32"
    checkpointing: str = ""
    beta: float = 0.7
    alpha: float = 0.8
    fraction: float = 1.0
    schedule: str = "constant"
    step: int = 3
    total_steps: int = 10
    told: str = "progress"  # or "total_steps" in the configuration
    rows: int = 2
    tokens: int = 12
    layout: str = "plain"
    embedded: bool = False  # inputs_embeds in place of input_ids
    labels: str = "all"
    micro_batches: int = 1
    counted: str = ""  # type of num_items_in_batch
    loss: str = "trainer"
    factor: float = 1.0  # on the loss, as of a gradient scaler
    before: str = ""  # what the model did before the step
    positional: bool = False
    images: bool = False
    hidden_states: bool = False  # asked for by the caller
    chunk_rows: int | None = None  # whose logits are computed together
    inspected: bool = False  # by AuxiliaryHeads.logits, after the step
    spoiled: tuple[str, Any] | None = None

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: value for name, value in given.items() if value != getattr(PLAIN, name)}
        return ", ".join(f"{name}={value!r}" for name, value in {"seed": self.seed, **changed}.items())


PLAIN = Case(seed=-1)


class Draw:
    """Draws from a seed, each by the name of what is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of(self, name: str) -> Random:
        return Random(f"{self.seed} {name}")

    def chance(self, name: str, probability: float) -> bool:
        return self.of(name).random() < probability

    def one(self, name: str, weights: Mapping[Any, float]) -> Any:
        return self.of(name).choices(list(weights), list(weights.values()))[0]
