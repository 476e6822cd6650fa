"""Which refusals a `Case` may meet, by patterns of messages that name what is refused."""

from __future__ import annotations

from .case import MIXTURES, Case
from .lora_fields import EMBEDDINGS


def may_be_refused(case: Case) -> list[str]:
    """Patterns of messages that name what a case combines and PEFT does not; empty if it must be trained."""
    peft, patterns = case.peft, []
    init = peft.get("init_lora_weights", True)
    embedding = EMBEDDINGS.get(case.architecture, "embed_tokens") in peft.get("target_modules", [])
    others = peft.get("use_dora") or init is not True or embedding or case.architecture in MIXTURES
    if peft.get("lora_bias") and others:
        patterns.append("lora_bias")
    if peft.get("use_dora") and case.architecture in MIXTURES:
        patterns.append("use_dora")
    if case.adapters != "one" and case.architecture in MIXTURES:
        patterns.append("target_parameters")
    if "bias" in peft and (case.adapters != "one" or (case.spoiled and case.spoiled[0] == "two adapters")):
        patterns.append("bias")
    if init in ("pissa", "olora") and "lm_head" in peft.get("target_modules", []):
        patterns.append("init_lora_weights")  # the base layer would keep what the adapter leaves of its weight
    if init == "orthogonal":
        patterns.append("Orthogonal initialization requires the LoRA rank to be even")
    if "exclude_modules" in peft:
        patterns.append("target_modules")
    if "trainable_token_indices" in peft:  # beside modules_to_save or LoRA for the same embedding
        patterns += ["trainable_token_indices", "TrainableTokensLayer"]
    if set(peft.get("modules_to_save", [])) & set(peft.get("target_modules", [])):
        patterns.append("ModulesToSaveWrapper")
    if case.architecture == "Qwen3-Next" and case.layout in ("packed, cu_seq_lens", "packed, seq_idx"):
        patterns.append("packed sequences")  # without flash-linear-attention
    if case.architecture in MIXTURES:
        patterns.append("Cannot convert PEFT target")
    return patterns


def refusal_of(case: Case) -> str:
    """A pattern of the message that refuses what spoils a case."""
    assert case.spoiled
    name = case.spoiled[0]
    return {
        "r": "`r`",
        "bias": "bias",
        "progress": "step: got -1",
        "target_modules": "Target modules",
        "untold schedule": "aux_loss_schedule",
        "two adapters": "active adapters|Only one adapter",
        "inference_mode": "inference_mode",
    }.get(name, name)
