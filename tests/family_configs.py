"""Configurations so small that a model of every family is built in a second.

Sizes are set by the name that a configuration gives them; what a family needs beside that stands in ``_OF_FAMILY``.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 5
VOCABULARY = 96
LENGTH = 24
WINDOW = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    # Attention to the best keys or blocks of keys only, and scales that grow with the position.
    "index_topk": WINDOW,
    "index_block_size": WINDOW,
    "index_topk_blocks": 2,
    "keep_window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "floor_scale": 4 * WINDOW,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_ngroups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "word_embed_proj_dim": 32,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "num_encoder_layers": 1,
    "num_decoder_layers": LAYERS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL]
_MLA = {"num_key_value_heads": 4}
# Whose choice of keys each layer takes: its own, or that of the layer before it.
_SHARED = ["full", "shared", "full", "shared", "shared"]
# Of what sees or hears; the language model is what is looked at.
_TOWER: dict[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "global_attn_indexes": [0],
    "num_global_layers": 1,
    "vision_output_dim": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "encoder_hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "vocab_size": VOCABULARY,
    "output_channels": 16,
    "projection_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    # of sound
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "downsample_hidden_size": 16,
    "output_dim": 32,
    "max_source_positions": 32,
    "num_layers": 1,
    "hidden_dim": 16,
    "dim_head": 8,
    "num_blocks": 1,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
    "num_filters": 4,
    "depths": [1, 1],
    "downsampling_ratios": [2],
    "mel_vocab_size": 8,
    "codebook_size": 16,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 16,
    "num_quantizers": 2,
    # of images that are made
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "latent_channels": 32,
    "num_embeddings": 16,
    "num_res_blocks": 1,
    "image_token_embed_dim": 32,
}
# Towers whose sizes are tied to others, by their own type.
_OF_TOWER: dict[str, dict[str, Any]] = {name: {"hidden_size": 32} for name in ("qwen2_vl_vision", "git_vision_model")}
# Its layers divide a patch by its prime factors.
_OF_TOWER["inkling_vision"] = {"patch_size": 4, "num_hidden_layers": 3}
# Parts that are language models themselves.
_TEXTS = ("text_config", "vlm_config", "thinker_config")
_PART = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_GLM_TEXTS = ("glm4v_text", "glm46v_text", "glm4v_moe_text", "glm_ocr_text")
# Names of image tokens, as Chameleon and Emu3 read them.
_IMAGE_TOKENS = {"<image>": 93, "IMGIMGAZ": 94, "IMGIMGBZ": 95, "<|visual token 000000|>": 94}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
# Of BERT's kind, which are asked for causal attention; camembert and roberta stay as they are, and are refused.
_DECODERS = (
    *("bert", "bert-generation", "big_bird", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
# What the names above do not settle.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
            *("longcat_flash", "minicpm3"),
        ),
        _MLA,
    ),
    **{name: {"is_decoder": True} for name in _DECODERS},
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": {"vocab_size": VOCABULARY, **_PART},
        "encoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 32, **_PART, "hidden_size": 16},
        "decoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 32, **_PART, "hidden_size": 16},
        "global_config": {**_PART, "num_hidden_layers": LAYERS},
    },
    "chameleon": {"vocabulary_map": _IMAGE_TOKENS},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]} for kind in (_FULL, _SLIDING)
        }
    },
    "cpmant": {
        "dim_head": 8,
        "dim_ff": 48,
        "hidden_size": 32,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "dbrx": {
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "rope_theta": 1e4,
    },
    "deepseek_v4": {
        "mlp_layer_types": ["moe"] * LAYERS,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 2 * WINDOW},
        **_MLA,
    },
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": _IMAGE_TOKENS},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "moe_num_experts": 4,
        "moe_k": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "fast_vlm": {"vision_config": "siglip_vision_model"},
    "fun_asr_nano": {"adaptor_config": {**_TOWER, "hidden_size": 32, "intermediate_size": 8}},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": {"num_kv_shared_layers": 2},
    "glm5_next_text": {
        **_MLA,
        "qk_rope_head_dim": 0,
        "qk_head_dim": 8,
        "index_topk": 8,
        "index_kpool": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "granite4_vision": {
        "text_config": "granite4_vision_text",
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "deepstack_layer_map": [],
    },
    "granite_speech": {"has_lora_adapter": False},
    "granite_speech_plus": {"has_lora_adapter": False},
    **{name: {"rope_parameters": _SECTIONS} for name in _GLM_TEXTS},
    "glm4v_moe_text": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [1, 1, 1, 1]}},
    "inkling_text": {
        "sliding_window_size": WINDOW,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": None,
    },
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "kyutai_speech_to_text": {"audio_pad_token_id": 4, "codebook_vocab_size": 8, "num_codebooks": 2},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", "conv", _FULL]},
    "paddleocr_vl_text": {"rope_parameters": _SECTIONS},
    "mistral4": {**_MLA, "head_dim": 16},
    "glm_moe_dsa": {**_MLA, "indexer_types": _SHARED},
    "hy_v4": {"indexer_types": _SHARED},
    "minimax": {"block_size": WINDOW},
    "minimax_m3_vl_text": {"layer_types": [_FULL, *["minimax_m3_sparse"] * 3, _FULL]},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 32},
    "moshi": {"num_codebooks": 2},
    **{name: {"enable_audio_output": False} for name in ("qwen2_5_omni", "qwen3_omni_moe")},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    **{name: {"use_sliding_window": True} for name in ("qwen2", "qwen2_moe")},
    **{
        name: {"use_sliding_window": True, "rope_parameters": _SECTIONS}
        for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text")
    },
    # Both read it where they see, and their configurations do not have it.
    **{name: {"vision_start_token_id": 93} for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "qwen3": {"use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh", "local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 1,
    },
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    # transformers zeroes the padding token's embedding again after loading it.
    "youtu": {**_MLA, "pad_token_id": None},
    "zamba": {
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": _HYBRID, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


_DRAFT = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "layer_types": [_SLIDING, _FULL],
    "sliding_window": WINDOW,
}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# Configurations that do not exist without their parts.
_WHOLE: dict[str, dict[str, Any]] = {
    **{
        name: {
            "text_encoder": {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 16, "num_layers": 1},
            "audio_encoder": {"model_type": "encodec", "hidden_size": 16, "num_filters": 4},
            "decoder": {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
        }
        for name in ("musicgen", "musicgen_melody")
    },
    "gemma4_assistant": {"text_config": _DRAFT},
    "gemma4_unified_assistant": {"text_config": {**_DRAFT, "model_type": "gemma4_unified_text"}},
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit", **_SMALL, "image_size": 28, "patch_size": 14},
        "decoder": {"model_type": "bert", **_SMALL},
    },
}


def small_config(family: str) -> Any:
    """A configuration of five layers, with two kinds of attention and a window inside the calibration's sequences."""
    if family in _WHOLE:
        return CONFIG_MAPPING[family](**copy.deepcopy(_WHOLE[family]))
    return _shrunk(CONFIG_MAPPING[family])


def _shrunk(kind: Any) -> Any:
    default = kind()
    known = default.to_dict()
    values = _known(_SIZES, {**known, **dict.fromkeys(default.attribute_map)})
    changes = dict(_OF_FAMILY.get(kind.model_type, {}))
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(changes.get(name), str):
            part = CONFIG_MAPPING[changes.pop(name)]()
        if part is not None:
            values[name] = _shrunk(type(part)).to_dict() if name in _TEXTS else _tower(part)
    if "layer_types" in known and set(known["layer_types"] or [_FULL]) <= {_FULL, _SLIDING}:
        values["layer_types"] = _MIXED
    if "mrope_section" in (known.get("rope_parameters") or {}):
        values["rope_parameters"] = {**known["rope_parameters"], "mrope_section": [2, 1, 1]}
    if "original_max_position_embeddings" in (known.get("rope_parameters") or {}):
        values["rope_parameters"] = {**known["rope_parameters"], "original_max_position_embeddings": 8 * WINDOW}
    if "mlp_layer_types" in known:
        values["mlp_layer_types"] = ["dense"] + ["sparse"] * 4
    return kind(**{**values, **changes})


def _tower(part: Any) -> dict[str, Any]:
    """The changed values of a part that sees or hears, and of the parts in it."""
    values = _known(_TOWER, part.to_dict()) | _OF_TOWER.get(part.model_type, {})
    inner = {name: getattr(part, name, None) for name in part.sub_configs}
    values |= {name: _tower(one) for name, one in inner.items() if one is not None}
    return values | ({"model_type": part.model_type} if part.model_type else {})


def _known(sizes: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The sizes whose names a configuration has, in the form that it has them in: one number or several."""
    several = (list, tuple)
    return {
        name: value
        for name, value in sizes.items()
        if name in known and (known[name] is None or isinstance(known[name], several) == isinstance(value, several))
    }
