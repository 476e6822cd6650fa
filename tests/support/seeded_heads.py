"""Heads whose weights a seed gives, pushed to a Hub and pulled from it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from peft_caft import AuxiliaryHeads

from .tiny_checkpoint import tiny_llama


def made(
    seed: int, base: PreTrainedModel | None = None, name: str = "org/tiny-llama", head_type: str = "residual"
) -> AuxiliaryHeads:
    heads = AuxiliaryHeads.from_base_model(base or tiny_llama(), 3, head_type)
    heads.config.base_model_name_or_path = name
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return heads


def push(seed: int, repo_id: str, head_type: str = "residual", token: str = "write-token", **arguments) -> str:
    """The new commit."""
    return made(seed, head_type=head_type).push_to_hub(repo_id, token=token, **arguments).oid


def load(repo_id: str, **arguments) -> AuxiliaryHeads:
    return AuxiliaryHeads.from_pretrained(repo_id, tiny_llama(), **arguments)


def seed_of(heads: AuxiliaryHeads) -> int | None:
    for seed in range(1, 8):
        own, other = made(seed, head_type=heads.config.head_type).state_dict(), heads.state_dict()
        if own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own):
            return seed
    return None
