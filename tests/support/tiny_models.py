"""Tiny random causal language models of four kinds, made from configurations: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 97
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    # Layers 0 and 2 attend to a window shorter than the tests' sequences; logits are capped.
    "gemma2": lambda: Gemma2Config(
        **LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, final_logit_softcapping=3.0
    ),
}
ARCHITECTURES = tuple(CONFIGS)
# Peculiar after the last layer: OPT registers its final norm before the layers, the others scale their logits.
PECULIAR = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
        dropout=0.0,
    ),
    "cohere": lambda: CohereConfig(**LLAMA_LIKE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0),
}
# transformers offers no sdpa for Gemma 2, whose attention scores are capped.
WITH_ATTENTION = [
    (a, attention) for a in CONFIGS for attention in ("eager", "sdpa") if (a, attention) != ("gemma2", "sdpa")
]


def tiny_model(architecture: str, seed: int = 0, attention: str = "eager", **changes) -> PreTrainedModel:
    """A model in fp32, with norm weights that are no ones, so that leaving a norm out shows."""
    config = (CONFIGS | PECULIAR)[architecture]()
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def tokens(batch: int = 2, length: int = 14, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
