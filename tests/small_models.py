"""Small random models of several families, with a byte tokenizer, saved as ordinary Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 259
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def config_of(family: str, **changes: object) -> PretrainedConfig:
    """The configuration of a small model of that family."""
    shape = {**_SHAPE, **changes}
    if family == "opt":
        shape.pop("num_key_value_heads")
        shape["ffn_dim"] = shape.pop("intermediate_size")
        return OPTConfig(**shape, word_embed_proj_dim=shape["hidden_size"], dropout=0.1)
    if family == "mistral":
        return MistralConfig(**shape, sliding_window=16)
    if family == "gemma2":
        return Gemma2Config(**shape, head_dim=8, sliding_window=16)
    if family == "gemma":
        return GemmaConfig(**shape, head_dim=8)
    if family == "qwen3":
        return Qwen3Config(**shape, head_dim=8)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**shape)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gemma", "gemma2")


def random_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_of(family, **changes)).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_model(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Path:
    """Write a small random model with its tokenizer and return the folder."""
    model = random_model(family, seed, **changes).to(dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
