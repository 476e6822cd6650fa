"""Tiny random models of the architectures in the first table of docs/architectures.md, two layers each, made from configurations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from .tiny_models import CONFIGS, LLAMA_LIKE, PECULIAR, VOCABULARY

LAYERS = 2
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **LLAMA_LIKE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _llava() -> PretrainedConfig:
    vision = tf.CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16)
    return tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**LLAMA_LIKE), image_token_index=96)


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama 2, Llama 3": CONFIGS["llama"],
    "Mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=5),
    "Qwen2": CONFIGS["qwen2"],
    "Qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "Gemma 2": CONFIGS["gemma2"],
    "Gemma 3": lambda: tf.Gemma3TextConfig(
        **LLAMA_LIKE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "Phi": lambda: tf.PhiConfig(**LLAMA_LIKE | {"num_key_value_heads": 4}, resid_pdrop=0.0, embd_pdrop=0.0),
    "GPT-2": CONFIGS["gpt2"],
    "GPT-NeoX": lambda: tf.GPTNeoXConfig(**{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "OPT": PECULIAR["opt"],
    "BLOOM": lambda: tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2, pad_token_id=0
    ),
    "Falcon": lambda: tf.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_hidden_size=48,
        initializer_range=0.2,
        pad_token_id=0,
    ),
    "StableLM": lambda: tf.StableLmConfig(**LLAMA_LIKE),
    "Granite": PECULIAR["granite"],
    "Cohere": PECULIAR["cohere"],
    "OLMo 2": lambda: tf.Olmo2Config(**LLAMA_LIKE),
    "SmolLM3": lambda: tf.SmolLM3Config(**LLAMA_LIKE),
    "Mixtral": lambda: tf.MixtralConfig(**LLAMA_LIKE, **MIXTURE),
    "Qwen3-MoE": lambda: tf.Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "DeepSeek-V3": lambda: tf.DeepseekV3Config(**DEEPSEEK),
    "GPT-OSS": lambda: tf.GptOssConfig(**LLAMA_LIKE, head_dim=8, sliding_window=5, **MIXTURE),
    "Mamba": lambda: tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=4),
    "Mamba 2": lambda: tf.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
    ),
    "Qwen3-Next": lambda: tf.Qwen3NextConfig(
        **LLAMA_LIKE,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "LLaVA (the text)": _llava,
}
TARGETS = {
    "Mamba": ["in_proj"],
    "Mamba 2": ["in_proj"],
}  # PEFT refuses out_proj, which their kernels read without its adapter
ATTENTIONS = ("eager", "sdpa")
# No sdpa in transformers: attention scores are capped, have a sink or a bias of positions, or there is no attention at all.
EAGER_ONLY = {"Gemma 2", "GPT-OSS", "BLOOM", "Mamba", "Mamba 2"}


def attentions_of(architecture: str) -> tuple[str, ...]:
    return ATTENTIONS[:1] if architecture in EAGER_ONLY else ATTENTIONS


def make(architecture: str, attention: str = "eager") -> PreTrainedModel:
    """In fp32, with vectors that are no ones and zeros, so that leaving a norm or bias out shows."""
    config = ARCHITECTURES[architecture]()
    text = config.get_text_config()
    text.num_hidden_layers = LAYERS
    if vars(text).get(
        "layer_types"
    ):  # the last ones, so that heads are copies of the layer that is not plain attention
        text.layer_types = text.layer_types[-LAYERS:]
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()
