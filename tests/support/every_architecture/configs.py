"""A tiny configuration of any model type of transformers: its defaults, with every size made small.

Sizes are found by the names of fields, in nested configurations too; `OVERRIDES` says what these rules do not.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .config_overrides import OVERRIDES

LAYERS = 3  # of the text and of every tower, so that a search by the number of layers meets several lists
VOCABULARY = 128
HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 8, 48

# The first pattern that matches a field's whole name gives its value, unless the default is None, 0 or a bool.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size|vocab_size_\w+|\w+_vocab|unpadded_vocab_size|vocab_offset", VOCABULARY),
    (r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_blocks|depth|layers)", LAYERS),
    (r"num_encoder_layers|num_decoder_layers|num_global_layers|num_layers_per_stack", LAYERS),
    (r"num_key_value_heads|swa_num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups", KEY_VALUE_HEADS),
    (r"linear_num_key_heads|n_groups", KEY_VALUE_HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_value_heads|n_mamba_heads)", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(\w+_)?(head_dim|d_head|dim_head|head_size|d_kv|kv_channels|headdim)", HEAD_DIM),
    (
        r"(moe_|shared_|expert_|\w+_)?(intermediate_size\w*|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|dff|dim_ff|d_inner)",
        INTERMEDIATE,
    ),
    (r"feed_forward_size|n_inner|share_expert_dim|moe_hidden_size", INTERMEDIATE),
    (
        r"\w*hidden_size\w*|d_model|n_embd|embed_dim|dim|width|emb_dim|embedding_dim|embedding_size|\w+_embedding_size",
        HIDDEN,
    ),
    (
        r"word_embed_proj_dim|projection_dim|(\w+_)?(output_dim|out_dim|input_dim)|lru_width|mm_embed_dim|output_proj_dims|adapter_in_dim|adapter_input_size|\w*hidden_dim",
        HIDDEN,
    ),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|moe_k)", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|topk_group|moe_layer_start_index", 1),
    (r"n_group|num_expert_group", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|\w*lora_rank|laurel_rank|hc_lowrank|adapter_rank|gated_norm_rank", 16),
    (r"image_size|crop_size|resolution|max_image_size|max_img_size", 16),
    (r"min_image_size", 4),
    (r"patch_size|encoder_stride", 4),
    (
        r"max_(position_embeddings|source_positions|target_positions|seq_len)|n_positions|n_ctx|context_length|seq_len",
        64,
    ),
    (
        r"max_2d_position_embeddings|model_max_length|num_position_embeddings|position_embedding_size|original_max_position_embeddings",
        64,
    ),
    (r"sliding_window(_size)?|attention_window_size|keep_window_size|local_attention", 5),
    (r"attention_chunk_size|(mamba_)?chunk_size|max_inference_chunksize", 8),
    (r"(mamba_|ssm_)?(d_state|state_size)|time_step_rank|mamba_dt_rank", 4),
    (r"index_topk|canvas_length|index_block_size|window_size", 8),
    (r"pooling_kernel_size", 2),
    (r"rotary_dim|mm_tokens_per_image|num_query_tokens|latent_query_num", 4),
    (r"n_groups|mamba_n_groups|mamba_ngroups|num_kv_shared_layers", 1),
    (r"index_n_heads|index_heads", 4),
    (r"block_multiple_of|ffn_round_up_to_multiple_of|intermediate_multiple_size", 4),
    (r"num_mel_bins|n_mel_bins|input_feat_size|feature_size", 16),
)
NO_NOISE = re.compile(r".*(dropout|_pdrop|layerdrop|drop_path_rate|jitter_noise).*|dropout_p|mask_(time|feature)_prob")
SPREAD = re.compile(r"init_std|(\w+_)?initializer_range|initializer_factor|embed_init_std")
# What comes after the lm_head, made strong enough to show.
AFTER_LM_HEAD = {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 3.0,
    "lm_head_multiplier": 0.3,
    "output_multiplier": 0.3,
}
SPECIAL_TOKEN = re.compile(r".*(token_id|token_index|_id|_token_ids)$")
FIRST_SPECIAL = 100  # ids below it are ordinary text


def tiny_config(model_type: str) -> PretrainedConfig:
    """Raises: whatever the configuration's own checks raise if rules and overrides do not make a valid one."""
    config_class = CONFIG_MAPPING[model_type]
    given = OVERRIDES.get(model_type, {})
    # Composite configurations have no defaults for some parts.
    values = config_class(**given.get("build", {})).to_dict()
    small = _merged(_shrunk(values), {name: value for name, value in given.items() if name != "build"})
    return config_class.from_dict(small)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def _shrunk(values: dict[str, Any], ids: dict[int, int] | None = None) -> dict[str, Any]:
    ids = {} if ids is None else ids
    layers = next((v for name, v in values.items() if _is_count(v) and _size(name) == LAYERS), None)
    small = {name: _small(name, value, layers, ids) for name, value in values.items() if name != "per_layer_config"}
    heads = next((v for name, v in values.items() if _is_count(v) and _size(name) == HEADS), None)
    for name, value in values.items():
        if _is_count(value) and _size(name) == KEY_VALUE_HEADS and value in (1, heads) and "linear" not in name:
            small[name] = HEADS if value == heads else 1  # as many keys as queries, or one for all
    return small


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _small(name: str, value: Any, layers: int | None, ids: dict[int, int]) -> Any:
    if name in AFTER_LM_HEAD and value is not None:
        return AFTER_LM_HEAD[name]
    if name == "is_decoder":
        return True
    if name == "mrope_section":
        return [2, 1, 1]
    if isinstance(value, dict):
        nested = name.endswith(("config", "parameters")) or "model_type" in value or name in ("attention", "main")
        return _shrunk(value, ids) if nested else value
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list | tuple):
        if name.endswith("token_ids") and all(isinstance(item, int) for item in value):
            return [_token(item, ids) for item in value]
        if name in ("image_size", "patch_size") and len(value) == 2:
            return [_size(name)] * 2
        if layers and len(value) == layers and layers > LAYERS:
            return list(range(LAYERS)) if list(value) == list(range(layers)) else _last_kinds(list(value))
        return value
    if NO_NOISE.fullmatch(name):
        return type(value)(0)
    if SPREAD.fullmatch(name):
        return type(value)(1) if name == "initializer_factor" else 0.2
    if _is_count(value):
        size = _size(name)
        if size is not None:
            return size
        if SPECIAL_TOKEN.fullmatch(name):
            return _token(value, ids)
    return value


def _token(value: int, ids: dict[int, int]) -> int:
    """Token ids beyond the vocabulary get distinct ones within it."""
    return value if value < FIRST_SPECIAL else ids.setdefault(value, FIRST_SPECIAL + len(ids))


def _last_kinds(values: list) -> list:
    """The last `LAYERS` entries, with every kind of layer if there is room."""
    kept = values[-LAYERS:]
    missing = [value for index, value in enumerate(values) if value not in kept and value not in values[:index]]
    for place, value in zip(range(LAYERS - 1), missing, strict=False):
        if kept.count(kept[place]) > 1:
            kept[place] = value
    return kept
