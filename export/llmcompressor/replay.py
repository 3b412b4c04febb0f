"""Prune a dense model as a recipe says, with llm-compressor and nothing else.

``python replay.py --output PRUNED`` in an exported folder uses the recipe, the calibration tokens and the dense model
that the folder names. Needs llmcompressor, which brings torch and transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
# Names whose first number is 0.
FIRST_LAYER = re.compile(r"\D*\.0\.")
# Relative; 16-bit activations differ by less than this when operations run in another order.
ROUNDING = 0.05


def replay(model: Any, recipe: str, tokens: torch.Tensor, pipeline: str = "sequential") -> None:
    """Prune a loaded model in place.

    Args:
        model: a causal LM of transformers.
        recipe: path of the recipe.
        tokens: calibration sequences, int64 ``[sequences, length]``, used one by one in this order.
        pipeline: ``sequential`` runs all modifiers in one pass over the layers, as the plan was made for;
            ``independent``, llm-compressor's default, makes a pass for each modifier.

    Raises:
        OtherActivations: see :func:`same_activations`.
    """
    with same_activations(model, tokens):
        oneshot(model=model, recipe=recipe, dataset=calibration_loader(tokens), pipeline=pipeline)


class OtherActivations(Exception):
    """llm-compressor calibrated on activations that the model does not compute."""


@contextmanager
def same_activations(model: Any, tokens: torch.Tensor) -> Iterator[None]:
    """Make sure that what runs inside calibrates on the model's own activations.

    The sequential pipeline runs a trace of the model, and in llm-compressor 0.14 the trace of some architectures
    (Mistral) lacks the causal mask, without a word. So the inputs that the first layer's linears get from the first
    sequence are compared with those of the model itself.

    Raises:
        OtherActivations: they differ by more than rounding.
    """
    row = tokens[:1].to(model.device)
    with _first_inputs(model) as expected, torch.no_grad():
        model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    with _first_inputs(model) as found:
        yield
    for name, inputs in expected.items():
        if name in found and found[name].shape == inputs.shape:  # a mixture's experts are shown more than their tokens
            difference = float((found[name] - inputs).abs().max() / inputs.abs().max().clamp(min=1e-6))
            if not difference < ROUNDING:
                kind = type(model).__name__
                raise OtherActivations(
                    f"llm-compressor traces {kind} wrongly: the inputs of {name} are off by {difference:.0%}"
                )


@contextmanager
def _first_inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the first input, in float32, that each linear of the first layer gets."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, given: tuple[torch.Tensor, ...]) -> None:
        if name not in inputs:
            inputs[name] = given[0].detach().float().cpu().clone()

    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and FIRST_LAYER.match(name)
    ]
    yield inputs
    for hook in hooks:
        hook.remove()


def calibration_loader(tokens: torch.Tensor) -> Any:
    """The sequences int64 ``[sequences, length]`` in the form that llm-compressor takes, in their order."""
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=1)  # type: ignore[arg-type]


def load(folder: str, dtype: str = "auto") -> Any:
    """A model folder or hub id as a causal LM in evaluation mode; ``auto`` keeps the checkpoint's own dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def check_same(folder: Path, hashes: dict[str, str]) -> None:
    """Stop when a file of the dense model is not the one that the plan was made for."""
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            sys.exit(f"{folder} has no {name}: give the dense model's folder with --model")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            sys.exit(f"{path} is not the file that the plan was made for: give another folder with --model")


def main() -> None:
    dense = json.loads((HERE / "dense_model.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Replay the recipe of this folder with llm-compressor.")
    parser.add_argument("--model", default=dense["folder"], help="folder of the dense model [%(default)s]")
    parser.add_argument("--output", required=True, help="folder for the pruned model")
    options = parser.parse_args()
    check_same(Path(options.model), dense["files"])
    model = load(options.model)
    try:
        replay(model, str(HERE / "recipe.yaml"), load_file(HERE / "calibration.safetensors")["tokens"])
    except OtherActivations as error:
        sys.exit(str(error))
    model.save_pretrained(options.output, save_compressed=False)
    print(f"{options.output}: pruned")


if __name__ == "__main__":
    main()
