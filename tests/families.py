"""Every causal LM that transformers can build small from its configuration, found from the auto-mapping.

Sizes are set by the name that a configuration gives them; what a family needs beside that stands in ``_OF_FAMILY``, and
a family that is left out stands in ``LEFT_OUT`` with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sparsedeploy.allocation import allocate
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.pruning.layers import prune_layers
from sparsedeploy.registry import ALLOCATORS, PRUNERS

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
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL]
_MLA = {"num_key_value_heads": 4}
_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "num_global_layers": 1,
    "vision_output_dim": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
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
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
# What the names above do not settle.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
            *("longcat_flash", "minicpm3"),
        ),
        _MLA,
    ),
    "bert": {"is_decoder": True},
    "blt": {
        "vocab_size": VOCABULARY,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": {"vocab_size": VOCABULARY, **_PART},
        "encoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 32, **_PART, "hidden_size": 16},
        "decoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 32, **_PART, "hidden_size": 16},
        "global_config": {**_PART, "num_hidden_layers": LAYERS},
    },
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
    "deepseek_v4": {"mlp_layer_types": ["moe"] * LAYERS, **_MLA},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": {"num_kv_shared_layers": 2},
    "git": {"vision_config": {**_VISION, "hidden_size": 32}},
    **{name: {"rope_parameters": _SECTIONS} for name in _GLM_TEXTS},
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
        "layer_types": None,
        "mlp_layer_types": None,
    },
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", _FULL, "conv", "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", "conv", _FULL]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    **{name: {"use_sliding_window": True} for name in ("qwen2", "qwen2_moe")},
    **{
        name: {"use_sliding_window": True, "rope_parameters": _SECTIONS}
        for name in ("qwen2_vl_text", "qwen2_5_vl_text")
    },
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
        "axial_pos_shape": [4, 8],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh", "local", "lsh", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 1,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
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
# Vision parts whose sizes are tied to others.
_VISION_OF: dict[str, dict[str, Any]] = {"qwen2_vl": {"hidden_size": 32}, "got_ocr2": {"output_channels": 16}}
# Larger than this is not small.
_LARGEST = 5_000_000
_LEFT_OUT: dict[str, str] = {
    "chameleon": "its image tokens are named in a vocabulary that a small model does not have",
    "emu3": "its image tokens are named in a vocabulary that a small model does not have",
    "gemma3n": "builds its vision part with timm, which is not installed; gemma3n_text is the same language model",
    "gemma4_assistant": "drafts for another model, whose hidden states it takes",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states it takes",
    "musicgen": "generates sound from another model's text",
    "musicgen_melody": "generates sound from another model's text",
    "phi4_multimodal": "its image and audio encoders have no small configuration",
}


def families() -> list[str]:
    """The model types that the auto-mapping of causal LMs names, left out or not."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal() -> list[str]:
    """The model types that also see or hear and are in no other mapping, left out or not."""
    return sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def left_out(family: str) -> str | None:
    """Why a family is not tested; None where it is."""
    return _LEFT_OUT.get(family)


def small_config(family: str) -> Any:
    """A configuration of five layers, with two kinds of attention and a window inside :data:`LENGTH` where it can."""
    return _shrunk(CONFIG_MAPPING[family], _OF_FAMILY.get(family, {}))


def small_model(family: str, seed: int = 0, config: Any = None) -> nn.Module:
    """A random model in evaluation mode, with every weight, bias and stored buffer away from its neutral value."""
    torch.manual_seed(seed)
    whole, text = (m.get(family) for m in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    kind = AutoModelForMultimodalLM if whole and whole != text else AutoModelForCausalLM
    config = config or small_config(family)
    if family in multimodal():
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
        if size > _LARGEST:
            raise ValueError(f"{size / 1e6:,.0f} million weights in the smallest configuration that is known here")
    model = kind.from_config(config).eval().requires_grad_(False)
    stored = model.state_dict()
    for tensor in {tensor.data_ptr(): tensor for tensor in stored.values() if tensor.is_floating_point()}.values():
        if tensor.dim() > 1:
            tensor.normal_(std=0.15)
        else:
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def saved_family(family: str, folder: Path) -> Path:
    """A small model's folder, with a tokenizer; of an encoder-decoder the configuration alone."""
    config = small_config(family)
    if config.is_encoder_decoder:
        config.save_pretrained(folder)
    else:
        small_model(family).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word ``w00`` to ``w95``."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number:02}": number for number in range(VOCABULARY)}, unk_token="w00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w00", bos_token="w01", eos_token="w02")


def calibration_tokens() -> torch.Tensor:
    """Six sequences, int64 ``[6, LENGTH]``."""
    return torch.randint(3, VOCABULARY - 3, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def product_masks(folder: Path, *, batch_size: int, sparsity: float = 0.5) -> dict[str, torch.Tensor]:
    """The masks of ``prune --method wanda --allocation uniform``, by module."""
    source = StreamedLayers(folder, device=torch.device("cpu"), dtype=torch.float32)
    plan = allocate(source, None, sparsity, None, "uniform", ALLOCATORS.get("uniform").make_options({}))
    options = PRUNERS.get("wanda").make_options({})
    layers = prune_layers(source, calibration_tokens(), plan, "wanda", options, batch_size=batch_size)
    return {name: pruned.mask for layer in layers for name, pruned in layer.modules.items()}


def _shrunk(kind: Any, changes: dict[str, Any]) -> Any:
    default = kind()
    known = default.to_dict()
    values = {name: value for name, value in _SIZES.items() if name in known or name in default.attribute_map}
    if "text_config" in known:
        text = default.text_config
        values["text_config"] = _shrunk(type(text), _OF_FAMILY.get(text.model_type, {})).to_dict()
        if "vision_config" in known and default.vision_config is not None:
            has = default.vision_config.to_dict()
            values["vision_config"] = {name: value for name, value in _VISION.items() if name in has}
            values["vision_config"] |= _VISION_OF.get(kind.model_type, {})
    if "layer_types" in known and set(known["layer_types"] or [_FULL]) <= {_FULL, _SLIDING}:
        values["layer_types"] = _MIXED
    if "mrope_section" in (known.get("rope_parameters") or {}):
        values["rope_parameters"] = {**known["rope_parameters"], "mrope_section": [2, 1, 1]}
    if "mlp_layer_types" in known:
        values["mlp_layer_types"] = ["dense"] + ["sparse"] * 4
    return kind(**{**values, **changes})
