"""Random base models at true sizes, and the arms that the jobs `step` and `profile` run on them.

All arms of a model share one base model: CAFT's heads of either type are two adapters of one PEFT model, and plain LoRA is one of these
with its auxiliary loss switched off, which calls the base model as PEFT's LoRA does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from flops import MODELS as SIZES
from flops import RANK, llama
from peft import PeftModel, get_peft_model
from step_worker import rows_loss, trl_trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from peft_caft import CAFTConfig
from peft_caft.planning.flops import ModelShapes, caft_step, lora_step

NUM_HEADS = 4
Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
TYPES = ("residual", "decoder_layer")


MODELS: dict[str, PretrainedConfig] = {
    **{name: SIZES[name] for name in ("Llama-2 7B", "Llama-3.1 8B", "Llama-2 13B")},
    "Qwen3 0.6B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
TINY = llama(512, 64, 128, 2, 4, 2)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        method: ``"lora"``, ``"trl"``, ``"rows"`` (LoRA that computes the logits of supervised tokens alone), or a head type.
        fraction: p.
        trained: whether the heads are trained too.
        checkpointing: gradient checkpointing of the base model.
    """

    method: str
    fraction: float = 1.0
    trained: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        names = {"lora": "LoRA", "trl": "LoRA in TRL", "rows": "LoRA, supervised rows"}
        name = names.get(self.method, f"CAFT, {self.method.replace('_', ' ')}")
        name += f", p = {self.fraction:g}" if self.fraction < 1 else ""
        name += ", trained heads" if self.trained else ""
        return name + (", checkpointing" if self.checkpointing else "")

    @property
    def baseline(self) -> str:
        """Name of the plain LoRA with which it is compared."""
        return Arm("lora", checkpointing=self.checkpointing).name

    @property
    def adapter(self) -> str:
        head_type = self.method if self.method in TYPES else TYPES[0]
        return f"{head_type}_trained" if self.trained else head_type


ARMS = [
    Arm("lora"),
    Arm("trl"),
    Arm("rows"),
    *(Arm(head_type, fraction) for head_type in TYPES for fraction in (1.0, 0.25)),
    Arm("lora", checkpointing=True),
    *(Arm(head_type, checkpointing=True) for head_type in TYPES),
    Arm("decoder_layer", 0.25, checkpointing=True),
    *(Arm(head_type, trained=True) for head_type in TYPES),
]


def random_model(config: PretrainedConfig, device: torch.device, trained_heads: bool = True) -> PeftModel:
    """A model of random weights, bf16 on a GPU, with LoRA on every linear map and fresh heads of both types."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # in which a CPU is fast
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    settings: dict[str, Any] = {
        "r": RANK,
        "target_modules": "all-linear",
        "num_auxiliary_heads": NUM_HEADS,
        "aux_loss_schedule": "constant",
        "task_type": "CAUSAL_LM",
    }
    model: Any = None
    for head_type in TYPES:
        for train_heads in ("frozen", "full") if trained_heads else ("frozen",):
            name = head_type if train_heads == "frozen" else f"{head_type}_trained"
            own = CAFTConfig(head_type=head_type, train_heads=train_heads, **settings)
            if model is None:
                model = get_peft_model(base, own, adapter_name=name)
            else:
                model.add_adapter(name, own)
    return model.to(device).train()


def random_batch(config: PretrainedConfig, rows: int, tokens: int, device: torch.device) -> Batch:
    """Random tokens, of which the second half of each row has labels."""
    ids = torch.randint(config.vocab_size, (rows, tokens), device=device)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Stepper:
    """Makes training steps of one arm, forward, backward and optimizer, on one batch.

    Args:
        optimizers: adapter -> its optimizer, which the arms of that adapter share; it is filled here.
    """

    def __init__(self, arm: Arm, model: PeftModel, optimizers: dict[str, torch.optim.Optimizer], batch: Batch) -> None:
        self.arm = arm
        self.model = model
        self.optimizers = optimizers
        self.batch = batch
        self.loss = {"trl": trl_loss, "rows": rows_loss}.get(arm.method, own_loss)(model)

    def prepare(self) -> None:
        """Switch the shared model to this arm, which takes the host a while."""
        model, arm = self.model, self.arm
        model.set_adapter(arm.adapter)
        model.peft_config[arm.adapter] = replace(model.peft_config[arm.adapter], aux_token_fraction=arm.fraction)
        base = model.get_base_model()
        if arm.checkpointing != base.is_gradient_checkpointing:
            if arm.checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base.gradient_checkpointing_disable()
        if arm.adapter not in self.optimizers:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizers[arm.adapter] = torch.optim.AdamW(trained, lr=1e-5)

    def __call__(self) -> None:
        device_type = self.batch["input_ids"].device.type
        as_trainer_does = torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda")  # with bf16=True
        with as_trainer_does, self.model.base_model.auxiliary_loss_enabled(self.arm.method in TYPES):
            loss = self.loss(self.batch)
        loss.backward()
        optimizer = self.optimizers[self.arm.adapter]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def own_loss(model: nn.Module) -> Loss:
    return lambda batch: model(**batch, use_cache=False).loss


def trl_loss(model: PeftModel) -> Loss:
    """The loss of TRL's SFTTrainer, with the metrics that it computes along with it.

    Raises:
        ImportError: if TRL is not installed.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    trainer = trl_trainer(model, bf16=not on_cpu, use_cpu=on_cpu)
    base = model.get_base_model()
    own_forward = vars(base).pop("forward", base.forward)  # TRL's, which the other arms must not meet

    def loss(batch: Batch) -> Tensor:
        base.forward = own_forward
        try:
            return trainer.compute_loss(trainer.model, dict(batch))
        finally:
            del base.forward

    return loss


def counted(shapes: ModelShapes, arm: Arm, tokens: int) -> float:
    """Operations of a step per token; the heads are counted as frozen."""
    if arm.method in TYPES:
        return caft_step(
            shapes, tokens / 2, arm.method, NUM_HEADS, 0.5, arm.fraction, gradient_checkpointing=arm.checkpointing
        ).total
    supervised = 0.5 if arm.method == "rows" else 1.0
    return lora_step(shapes, tokens / 2, supervised, gradient_checkpointing=arm.checkpointing).total
