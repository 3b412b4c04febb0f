"""How far right computations of a known answer are apart, measured at the export.

An engine rounds what it multiplies: to a type of 16 bits, or to 8 bits with a scale for every few numbers. The model is
computed again with its inputs rounded so, and what that makes of the logits is kept with the answer. Which way a number
on an edge falls differs between machines, so each pass moves the numbers a little before they are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from sparsedeploy.artifacts.description import SelfTest
from sparsedeploy.artifacts.known_answer import row_differences, save_known_answer, tolerance
from sparsedeploy.targets.check import Reference, answer_again

# How far float32 activations of two machines are apart, as a part of their range; measured is less than 1e-7.
ROUNDING = 1e-6
# Numbers that share a scale: in ggml's Q8_0, to which llama.cpp rounds what it multiplies with Q8_0 and Q4_0, and in
# our kernels for weights of codes.
GROUP = 32
_PASSES = 6

# Inputs [..., C] and the generator of what moves them -> the inputs as an engine rounds them.
Rounding = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@torch.no_grad()
def spread_of(model: PreTrainedModel, reference: Reference, ways: Iterable[AbstractContextManager[None]]) -> np.ndarray:
    """How far a model's logits are from the reference's after each token of its known answer, float64 [T].

    Args:
        ways: in each the model computes as a right engine may. The largest difference counts.
    """
    answer = reference.known_answer()
    spread = np.zeros(len(answer.tokens))
    for way in ways:
        with way:
            spread = np.maximum(spread, row_differences(answer, answer_again(model, reference)))
    return spread


def save_measured(folder: Path, reference: Reference, spread: np.ndarray, dtype: str) -> SelfTest:
    """Keep the reference's answer in the folder of an exported model, with its spread.

    Args:
        dtype: that the engine computes in. Where the model overflows it, no spread can be measured, and its tolerance
            holds.
    """
    if not np.isfinite(spread).all():
        return save_known_answer(folder, *reference.answer, tolerance(dtype))
    return save_known_answer(folder, *reference.answer, tolerance("float32"), spread)


def rounded(inputs: Mapping[nn.Module, Rounding]) -> Iterator[AbstractContextManager[None]]:
    """Ways of computing in which the inputs of modules are rounded, for :func:`spread_of`."""
    for seed in range(_PASSES):
        yield _rounded(inputs, torch.Generator().manual_seed(seed))


@contextmanager
def _rounded(inputs: Mapping[nn.Module, Rounding], generator: torch.Generator) -> Iterator[None]:
    def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[module](given[0], generator), *given[1:])

    with ExitStack() as stack:
        for module in inputs:
            stack.callback(module.register_forward_pre_hook(hook, prepend=True).remove)
        yield


def moved(size: float) -> Rounding:
    """As far as another order of sums moves inputs of a range of this size; what rounds them comes after."""
    return lambda x, generator: x + ROUNDING * size * _noise(x, generator)


def to_groups(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """8 bits and a scale for every :data:`GROUP` numbers, the largest of which becomes 127."""
    padded = nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = padded.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1)
    levels = (padded / scale + 127 * ROUNDING * _noise(padded, generator)).round()
    return (levels * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def to_type(dtype: torch.dtype) -> Rounding:
    """A floating-point type of 16 bits."""
    step = torch.finfo(dtype).eps / 2

    def rounding(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return (x.float() * (1 + step * _noise(x, generator))).to(dtype).to(x.dtype)

    return rounding


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Between -1 and 1, float32."""
    return torch.rand(like.shape, generator=generator).mul_(2).sub_(1)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model of 16-bit weights compute in float32.

    Each module's own weights are converted while it runs, so that the model takes no more memory than before.
    """
    kept: dict[nn.Module, dict[str, torch.Tensor]] = {}

    def widen(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        own = {name: tensor for name, tensor in module.named_parameters(recurse=False) if tensor.is_floating_point()}
        kept[module] = {name: tensor.data for name, tensor in own.items()}
        for tensor in own.values():
            tensor.data = tensor.data.float()
        return tuple(map(_widened, inputs)), {name: _widened(value) for name, value in named.items()}

    def narrow(module: nn.Module, inputs: Any, outputs: Any) -> None:
        for name, tensor in kept.pop(module, {}).items():
            module.get_parameter(name).data = tensor

    with ExitStack() as stack:
        for module in model.modules():
            if any(tensor.is_floating_point() for tensor in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(widen, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(narrow, always_call=True).remove)
        yield


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
