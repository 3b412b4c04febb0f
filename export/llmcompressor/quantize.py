"""Quantise a pruned model with llm-compressor, its masks held, and examine what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStrategy, preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import ConstantPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from replay import calibration_loader, same_activations
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

# Our names -> llm-compressor's.
PRESETS = {"fp8-dynamic": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16"}
# Weights that share a scale in w4a16, largest first; each must divide every module's inputs.
_GROUP_SIZES = (128, 64, 32)


class HeldMasks(ConstantPruningModifier):
    """ConstantPruningModifier that holds its masks in ``oneshot`` too.

    The original multiplies weights by their masks only after an optimizer's step. ``oneshot`` takes none, and GPTQ,
    which moves rounding errors on to later columns, then revives pruned weights.
    """

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        for name in self.parameterized_layers_:
            self.apply_mask_weight(name)


def scheme_for(name: str, columns: set[int]) -> QuantizationScheme:
    """llm-compressor's preset, with weight groups that divide every module's inputs."""
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    if scheme.weights.strategy == QuantizationStrategy.GROUP:
        size = next((size for size in _GROUP_SIZES if all(count % size == 0 for count in columns)), None)
        scheme.weights.group_size = size
        if size is None:
            scheme.weights.strategy = QuantizationStrategy.CHANNEL
    return scheme


def quantize(
    model: Any, scheme: str, algorithm: str, tokens: torch.Tensor | None, masks: Mapping[str, torch.Tensor]
) -> int | None:
    """Quantise the masked modules of a model in place; returns the group size, None where scales are per channel.

    Args:
        algorithm: ``round`` takes the nearest value and needs no text; ``gptq`` spreads the error over later weights.
        tokens: calibration sequences, int64 ``[sequences, length]``, for ``gptq``.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    groups = {"group_0": scheme_for(scheme, {mask.shape[1] for mask in masks.values()})}
    outside = [name for name in linears if name not in masks]
    if algorithm == "gptq":
        quantizer = GPTQModifier(config_groups=groups, ignore=outside)
    else:
        quantizer = QuantizationModifier(config_groups=groups, ignore=outside)
    held = HeldMasks(targets=list(masks), start=0)
    # In this order the masks go on after the quantiser has changed a layer.
    recipe = [quantizer, held]
    if tokens is None:
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    else:
        with same_activations(model, tokens):
            oneshot(model=model, recipe=recipe, dataset=calibration_loader(tokens), pipeline="sequential")
    size = groups["group_0"].weights.group_size
    return int(size) if size else None


def examine(
    folder: str, masks: Mapping[str, torch.Tensor], windows: torch.Tensor | None, probe: Path
) -> dict[str, Any]:
    """Decompress a quantised folder with compressed-tensors, count its zeros and run it.

    Args:
        probe: .npy file of int64 ``[T]``; the last ones are replaced by greedy ones. Tokens and logits go beside it.

    Returns:
        ``weights`` of the masked modules, ``pruned`` by their masks, ``revived`` (pruned, but not zero any more),
        ``zeros`` of all kinds, ``perplexity_after`` on the windows, and the ``arrays`` of the probe.
    """
    uncompressed = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=uncompressed, trust_remote_code=False
    ).eval()
    counts = {"weights": 0, "pruned": 0, "revived": 0, "zeros": 0}
    for name, mask in masks.items():
        zero = model.get_submodule(name).weight.cpu() == 0
        counts["weights"] += mask.numel()
        counts["pruned"] += int((~mask).sum())
        counts["revived"] += int((~mask & ~zero).sum())
        counts["zeros"] += int(zero.sum())
    after = None if windows is None else perplexity(model, windows)
    return {**counts, "perplexity_after": after, "arrays": answer(model, probe)}


@torch.no_grad()
def answer(model: Any, probe: Path, greedy: int = 4) -> dict[str, str]:
    """Save a probe's tokens, the last ``greedy`` of them chosen by the model, and their logits; returns the paths."""
    tokens = torch.from_numpy(np.load(probe))[None].to(model.device)
    for at in range(tokens.shape[1] - greedy, tokens.shape[1]):
        tokens[0, at] = model(input_ids=tokens[:, :at], use_cache=False).logits[0, -1].argmax()
    logits = model(input_ids=tokens, use_cache=False).logits[0].float()
    paths = {"tokens": probe.with_name("answer-tokens.npy"), "logits": probe.with_name("answer-logits.npy")}
    np.save(paths["tokens"], tokens[0].cpu().numpy())
    np.save(paths["logits"], logits.cpu().numpy())
    return {name: str(path) for name, path in paths.items()}


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean cross-entropy over int64 ``windows [count, context]``, logits in float32."""
    losses = []
    for window in windows.to(model.device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).double())
    return float(torch.stack(losses).mean().exp())
