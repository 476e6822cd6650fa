"""What the rules of `configs` do not find: values of one model type each, by names of its configuration."""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
GLM_VISION = {
    "text_config": {
        "head_dim": 16,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    }
}

MROPE = {"text_config": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}}
DOTS_NOTE = {"per_layer_config": {"0": {"kv_lora_rank": 8}, "1": {"kv_lora_rank": 8}}, "head_dim": 16}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
COMPASS = {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 1, 1]}}}
SAM = {
    "output_channels": 32,
    "downsample_channels": [32, 32],
    "window_size": 2,
    "global_attn_indexes": [1],
    "scale": 16,
}
VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "latent_channels": 32,
    "num_res_blocks": 1,
    "num_embeddings": 8,
}
SHARED_KEYS = {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
PINPOINTS = {"image_grid_pinpoints": [[16, 16]]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "gemma4": {
        "build": {"vision_config": {}, "audio_config": {}},
        "text_config": SHARED_KEYS | {"per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 16}}},
    },
    "gemma4_unified": {"build": {"vision_config": {}, "audio_config": {}}},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "llava_next": PINPOINTS,
    "llava_next_video": PINPOINTS,
    "llava_onevision": PINPOINTS,
    "minicpm_ocr": {"image_token_id": 100},
    "minicpmv4_6": {"image_token_id": 100},
    "minicpmv4_7": {"image_token_id": 100},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96},
    },
    "muse_glimmer": {"out_hidden_size": 128},
    "nemotron_h_omni": {"img_context_token_id": 100},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {
        "vocabulary_map": {"<image>": 100} | {f"IMGIMG{c}Z": 101 + i for i, c in enumerate("ABCDEFGH")},
        "vq_config": VQ,
    },
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": SAM},
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 3,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"num_nextn_predict_layers": 0},
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM | {"image_size": 64}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": DOTS_NOTE},
    "dots3_note_text": DOTS_NOTE,
    "emu3": {
        "vocabulary_map": {"<image>": 100} | {f"<|visual token {i:06d}|>": 101 + i for i in range(8)},
        "vq_config": VQ | {"codebook_size": 8, "latent_channels": 4},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "florence2": {
        "vision_config": {
            "embed_dim": [8, 8, 8, 16],
            "num_heads": [1, 1, 1, 1],
            "num_groups": [1, 1, 1, 1],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
        }
    },
    "gemma3n_text": SHARED_KEYS,
    "gemma4_assistant": {
        "build": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "gemma4_text": SHARED_KEYS | {"per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 16}}},
    "glm46v": GLM_VISION,
    "glm4v": GLM_VISION,
    "glm4v_moe": GLM_VISION,
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": GLM_VISION,
    "glmga": GLM_VISION,
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[16, 16]],
        "deepstack_layer_map": [[-2, 1]],
        "spatial_target_layers": [0, 1, 1, 2],
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": ROPE | {"mrope_section": [1, 1, 1, 1]}}},
    "hy_v4": {"indexer_types": ["full", "shared", "full"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {"vq_config": VQ | {"embed_dim": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mistral4": {"head_dim": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "muse_spark": {
        "audio_config": {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "patch_sizes": [16, 6, 5, 4],
            "num_hidden_layers": 4,
        },
        "out_hidden_size": 128,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "mamba_num_heads": 8,
        "n_groups": 2,
    },
    "paddleocr_vl": MROPE,
    "pp_formulanet": {
        "vision_config": SAM
        | {"post_conv_in_channels": 32, "post_conv_mid_channels": 32, "post_conv_out_channels": 32}
    },
    "qwen2_5_omni_thinker": MROPE | {"vision_start_token_id": 110},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_shape": [2, 7],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 7,
        "lsh_attn_chunk_length": 7,
    },
    "step3p7": {"text_config": {"sliding_window": 5}},
    "unlimited_ocr": {"vision_config": {"sam_config": SAM}},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
    },
    "zaya": {"num_experts_per_tok": 1},
}
