"""Turn the float32 graph for DeepSparse into one whose pruned products run in 8-bit integers.

A product with a constant matrix becomes QuantizeLinear, MatMulInteger, Cast and Mul: activations in uint8 with one
range for each input, fixed by the calibration text; weights in int8, symmetric, with one scale for each output, so that
zero is exactly zero. The output head, the embedding and the attention products stay in float32.

What DeepSparse 1.8.0 makes of other forms (measured with one 1024 x 1024 product): a DequantizeLinear of weights with a
scale for each output leaves the engine (fraction_of_supported_ops 0.75); with one scale for the whole matrix, pairs of
QuantizeLinear and DequantizeLinear are accepted, but the product is computed in float32, slower than without them;
DynamicQuantizeLinear ends its compilation with an assertion. The form used here runs on its int8 kernels, sparse too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.targets.onnx_file import DATA_FILE, MODEL_FILE, TRANSPOSED, add_constant, import_onnx


@dataclass(frozen=True)
class Range:
    """The smallest and largest value of an activation; both ends reach at least to 0, which must be exact."""

    low: float
    high: float


@dataclass(frozen=True)
class Int8Count:
    """Weights in the integer matrices; zeros among them, and zeros of the float matrices (all of them still zero)."""

    weights: int
    zeros: int
    float_zeros: int


@torch.no_grad()
def activation_ranges(model: nn.Module, linears: Mapping[str, nn.Linear], tokens: torch.Tensor) -> dict[str, Range]:
    """Run calibration sequences [N, L] and keep the extremes of every linear's input."""
    lows = dict.fromkeys(linears, 0.0)
    highs = dict.fromkeys(linears, 0.0)
    with _watch(linears, lows, highs):
        for sequence in progress.track(tokens, "ranges of the activations", total=len(tokens)):
            model(input_ids=sequence[None], use_cache=False)
    return {name: Range(lows[name], highs[name]) for name in linears}


@contextmanager
def _watch(linears: Mapping[str, nn.Linear], lows: dict[str, float], highs: dict[str, float]) -> Iterator[None]:
    def watch(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = inputs[0].aminmax()
            lows[name], highs[name] = min(lows[name], float(low)), max(highs[name], float(high))

        return see

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and one float32 scale for each column of a matrix [in, out]: nearest of 255 levels around zero."""
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def quantize_range(found: Range) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (uint8) of an activation's range."""
    span = found.high - found.low
    scale = np.float32(span / 255 if span > 0 else 1)
    return np.asarray(scale), np.asarray(np.rint(-found.low / scale), np.uint8)


@torch.no_grad()
def fake_quantize(linears: Mapping[str, nn.Linear], ranges: Mapping[str, Range]) -> None:
    """Let a model's linears compute in float32 what :func:`write_int8` makes of them, in place.

    Unlike 8-bit products on some processors, which saturate at 16 bits, this is the same everywhere.
    """

    def round_inputs(scale: float, zero: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            levels = (torch.round(inputs[0] / scale) + zero).clamp(0, 255)
            return ((levels - zero) * scale, *inputs[1:])

        return hook

    for name, found in ranges.items():
        integers, scales = quantize_weight(linears[name].weight.float().numpy().T)
        linears[name].weight.copy_(torch.from_numpy(integers * scales).T)
        scale, zero = quantize_range(found)
        linears[name].register_forward_pre_hook(round_inputs(float(scale), int(zero)))


def write_int8(
    source: Path, folder: Path, ranges: Mapping[str, Range], sizes: Mapping[str, int], *, largest_single_file: int
) -> Int8Count:
    """Write ``model.onnx`` with the named linears in integers, from the float32 ``source`` graph, one tensor at a time.

    Args:
        sizes: weights of each linear; what its matrix holds besides is padding and does not count.

    Raises:
        UserError: a linear that is not a product with one constant matrix of the graph.
    """
    onnx = import_onnx()
    model = onnx.load(source, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = {f"{name}.weight{TRANSPOSED}": name for name in ranges}
    products = [
        node for node in model.graph.node if node.op_type == "MatMul" and wanted.get(node.input[1], "") in ranges
    ]
    missing = sorted(set(wanted) - {node.input[1] for node in products})
    if missing:
        raise UserError(
            f"{wanted[missing[0]]} is not a plain product in the exported graph",
            "Keep it in float32: --target-option int8_keep=NAME.",
        )
    scales: dict[str, np.ndarray] = {}
    weights = zeros = float_zeros = 0
    with ExitStack() as stack:
        data: BinaryIO | None = None
        if sum(_bytes(tensor, tensor.name in wanted) for tensor in tensors.values()) > largest_single_file:
            data = stack.enter_context(open(folder / DATA_FILE, "wb"))
        del model.graph.initializer[:]
        for name, tensor in progress.track(tensors.items(), "quantise the weights", total=len(tensors)):
            array = onnx.numpy_helper.to_array(tensor, base_dir=str(source.parent))
            if name in wanted:
                integers, scales[name] = quantize_weight(array)
                size = sizes[wanted[name]]
                weights += size
                zeros += size - int(np.count_nonzero(integers))
                float_zeros += size - int(np.count_nonzero(array))
                array = integers
            add_constant(model, name, array, data)
        nodes = _integer_nodes(model, products, wanted, ranges, scales, data)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    onnx.save(model, folder / MODEL_FILE)
    onnx.checker.check_model(str(folder / MODEL_FILE))
    return Int8Count(weights, zeros, float_zeros)


def _integer_nodes(
    model: Any,
    products: list[Any],
    wanted: Mapping[str, str],
    ranges: Mapping[str, Range],
    scales: Mapping[str, np.ndarray],
    data: BinaryIO | None,
) -> list[Any]:
    """The graph's nodes with each product in integers; products of the same input share its quantisation."""
    onnx = import_onnx()
    make = onnx.helper.make_node
    outputs = {node.output[0] for node in products}
    nodes: list[Any] = []
    seen: set[str] = set()
    for node in model.graph.node:
        copy = type(node)()
        copy.CopyFrom(node)
        if not (node.op_type == "MatMul" and node.output[0] in outputs):
            nodes.append(copy)
            continue
        value, matrix = node.input
        module = wanted[matrix]
        scale, zero = quantize_range(ranges[module])
        if value not in seen:
            seen.add(value)
            add_constant(model, f"{value}.scale", scale, data)
            add_constant(model, f"{value}.zero", zero, data)
            nodes.append(make("QuantizeLinear", [value, f"{value}.scale", f"{value}.zero"], [f"{value}.int8"]))
        add_constant(model, f"{matrix}.scale", (scales[matrix] * scale).astype(np.float32), data)
        add_constant(model, f"{matrix}.zero", np.asarray(0, np.int8), data)
        total, real = f"{node.output[0]}.int32", f"{node.output[0]}.float"
        nodes.append(make("MatMulInteger", [f"{value}.int8", matrix, f"{value}.zero", f"{matrix}.zero"], [total]))
        nodes.append(make("Cast", [total], [real], to=onnx.TensorProto.FLOAT))
        nodes.append(make("Mul", [real, f"{matrix}.scale"], [node.output[0]]))
    return nodes


def _bytes(tensor: Any, integer: bool) -> int:
    count = int(np.prod(tensor.dims)) if len(tensor.dims) else 1
    return count if integer else 4 * count
