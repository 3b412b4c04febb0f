"""The straightforward pruning loop of the papers' repositories, written anew: the whole model in memory, one statistic
per linear, a forward pass of each layer before and after pruning, a column loop for SparseGPT.

    python two_forward_loop.py MODEL METHOD SPARSITY TOKENS.npy OUTPUT

Prints one JSON line: seconds of loading, pruning and saving, and peak memory in bytes, and that of the
imports alone.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from peak import peak_bytes
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (at start-up, as llm-compressor does)

BLOCK = 128


@torch.no_grad()
def prune(model: nn.Module, tokens: torch.Tensor, method: str, sparsity: float) -> None:
    captured: dict[str, Any] = {}
    hidden: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        captured.update(
            {key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")}
        )

    layers: Any = model.get_submodule("model.layers")
    handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for row in tokens:
        model(input_ids=row[None], use_cache=False)
    handle.remove()
    for layer in layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        sums = {
            name: torch.zeros((m.in_features, m.in_features) if method == "sparsegpt" else (m.in_features,))
            for name, m in linears.items()
        }
        handles = [module.register_forward_pre_hook(adding_to(sums[name])) for name, module in linears.items()]
        for state in hidden:
            layer(state, **captured)
        for one in handles:
            one.remove()
        for name, module in linears.items():
            if method == "sparsegpt":
                module.weight.copy_(sparsegpt(module.weight.float(), sums[name] * 2 / len(tokens), sparsity))
            else:
                scores = module.weight.float().abs() * (sums[name] / len(tokens)).sqrt()
                order = scores.sort(dim=1, stable=True).indices[:, : int(module.in_features * sparsity)]
                module.weight.scatter_(1, order, 0)
        hidden = [layer(state, **captured) for state in hidden]


def adding_to(total: torch.Tensor) -> Any:
    """A hook that adds X^T X, or its diagonal, to ``total``."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        total.add_(x.T @ x if total.dim() == 2 else x.square().sum(0))

    return hook


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, sparsity: float) -> torch.Tensor:
    columns = weight.shape[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, inner = weight[:, start:end].clone(), inverse[start:end, start:end]
        scores = (block / inner.diagonal()).square()
        threshold = scores.flatten().sort().values[int(scores.numel() * sparsity)]
        errors = torch.zeros_like(block)
        for j in range(end - start):
            kept = torch.where(scores[:, j] > threshold, block[:, j], 0)
            errors[:, j] = (block[:, j] - kept) / inner[j, j]
            block[:, j:] -= errors[:, j : j + 1] @ inner[j : j + 1, j:]
            block[:, j] = kept
        weight[:, start:end] = block
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


def main() -> None:
    imports = peak_bytes()
    folder, method, sparsity, tokens_file, output = sys.argv[1:]
    tokens = torch.from_numpy(np.load(tokens_file))
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loaded = time.perf_counter()
    prune(model, tokens, method, float(sparsity))
    pruned = time.perf_counter()
    model.save_pretrained(output)
    times = {"load": loaded - started, "prune": pruned - loaded, "save": time.perf_counter() - pruned}
    print(json.dumps({"seconds": times, "peak_bytes": peak_bytes(), "imports_bytes": imports}))


if __name__ == "__main__":
    main()
