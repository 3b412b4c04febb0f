"""Every causal LM that transformers can build small from its configuration, found from the auto-mapping.

A family that is left out stands in ``_LEFT_OUT`` with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sparsedeploy.allocation import allocate
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.pruning.layers import prune_layers
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from tests.family_configs import LENGTH, VOCABULARY, small_config

# The code of the character of token 0.
_FIRST = ord("!") - 3
# Larger than this is not small.
_LARGEST = 20_000_000
_LEFT_OUT = {
    "perception_lm": "builds its vision part with timm, which is not installed; llama is the same language model",
    "gemma3n": "builds its vision part with timm, which is not installed; gemma3n_text is the same language model",
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


def small_model(family: str, seed: int = 0, config: Any = None) -> nn.Module:
    """A random model in evaluation mode, with every weight, bias and stored buffer away from its neutral value."""
    torch.manual_seed(seed)
    whole, text = (m.get(family) for m in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    kind = AutoModelForMultimodalLM if whole and whole != text else AutoModelForCausalLM
    config = config or small_config(family)
    build = kind.from_config
    if type(config) not in kind._model_mapping:  # Evolla's, whose name is that of another type, too
        build = getattr(transformers, whole or text)._from_config
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:,.0f} million weights in the smallest configuration that is known here")
    model = build(config).eval().requires_grad_(False)
    stored, weights = model.state_dict(), {tensor.data_ptr() for tensor in model.parameters()}
    for tensor in {tensor.data_ptr(): tensor for tensor in stored.values() if tensor.is_floating_point()}.values():
        if tensor.dim() < 2:
            tensor.add_(0.1 * torch.rand_like(tensor))
        elif tensor.data_ptr() in weights:
            tensor.normal_(std=0.15)
        else:  # such as MiniMax's decay, whose zeros are its mask
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
    return model


def saved_family(family: str, folder: Path) -> Path:
    """A small model's folder, with a tokenizer; of an encoder-decoder its decoder alone, such as BartForCausalLM.

    Where transformers has no such class, the configuration is all that is saved.
    """
    config = small_config(family)
    if config.is_encoder_decoder and (family in multimodal() or config.has_no_defaults_at_init):
        config.save_pretrained(folder)
    else:
        small_model(family).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each visible character but the last, behind three special ones."""
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    vocabulary |= {chr(_FIRST + number): number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def text_of(tokens: torch.Tensor) -> str:
    """A text that :func:`character_tokenizer` turns into these tokens from 3 on."""
    return "".join(chr(_FIRST + token) for token in tokens.flatten().tolist())


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
