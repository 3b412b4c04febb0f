"""Small models of each family, with weights so large that a wrong mask or position shows, and a loop over a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PretrainedConfig, PreTrainedModel

from tests.small_models import VOCABULARY, byte_tokenizer, config_of

SLIDING = ("mistral", "qwen2", "gemma2", "gemma3")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gemma", "gemma2", "gemma3")
# Weights of this spread give logits of about 5, some hundred times the default's.
_SPREAD = 0.15


def config_for_export(family: str) -> PretrainedConfig:
    if family == "opt":
        return config_of("opt", init_std=_SPREAD)
    if family == "qwen2":
        return config_of(
            "qwen2", initializer_range=_SPREAD, use_sliding_window=True, sliding_window=16, max_window_layers=1
        )
    if family == "gemma3":
        shape = config_of("gemma", initializer_range=_SPREAD).to_dict()
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        return Gemma3TextConfig(
            **{key: shape[key] for key in (*kept, "head_dim", "max_position_embeddings", "initializer_range")},
            num_hidden_layers=2,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    if family == "gemma2":
        # A cap of the size of the scores, so that leaving it out shows.
        return config_of("gemma2", initializer_range=_SPREAD, attn_logit_softcapping=2.0)
    return config_of(family, initializer_range=_SPREAD)


def save_for_export(folder: Path, family: str) -> PreTrainedModel:
    """Write the model with its tokenizer; return it with plain attention (the fused one drops Gemma 2's soft cap)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_for_export(family)).eval().requires_grad_(False)
    # Biases and norm weights start at 0 or 1: move them, so that one that gets lost shows.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


def random_tokens(batch: int, length: int) -> torch.Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(3, VOCABULARY - 3, (batch, length), generator=torch.Generator().manual_seed(5))


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class GraphRunner:
    """Feeds a graph step by step with its own cache.

    Args:
        empty_columns: cache columns that exist before the first token and are masked, as in an engine with a cache of
            fixed size.
    """

    def __init__(self, session: onnxruntime.InferenceSession, batch: int, empty_columns: int = 0) -> None:
        self.session = session
        self.inputs = [entry.name for entry in session.get_inputs()]
        self.outputs = [entry.name for entry in session.get_outputs()]
        self.cache = {
            entry.name: np.zeros((batch, entry.shape[1], empty_columns, entry.shape[3]), np.float32)
            for entry in session.get_inputs()
            if entry.name.startswith("past_key_values")
        }
        self.mask = np.zeros((batch, empty_columns), np.int64)

    def step(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, L, V] of the next tokens [B, L]; ``mask`` [B, L] is 0 at padding."""
        new = np.ones(tokens.shape, np.int64) if mask is None else mask.numpy()
        past, length = self.mask.shape[1], tokens.shape[1]
        self.mask = np.concatenate([self.mask, new], axis=1)
        values = self.session.run(
            None,
            {
                "input_ids": tokens.numpy(),
                "attention_mask": self.mask,
                "positions": np.maximum(self.mask.cumsum(1) - 1, 0)[:, past:],
                "causal_mask": np.tile(np.tri(length, past + length, past, np.int64), (len(tokens), 1, 1, 1)),
                **self.cache,
            },
        )
        self.cache = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self.outputs[1:], values[1:], strict=True)
        }
        return torch.from_numpy(values[0])
