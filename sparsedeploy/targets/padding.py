"""Pad the products of a graph with zeros until their input width is a multiple of what an engine's kernels take.

DeepSparse 1.8.0 multiplies by a sparse matrix wrongly, without a word, where the input width is not a multiple of 16
(measured with one product, 80 % zeros, for every width from 80 to 112: errors as large as the result, in its AVX2 and
in its AVX-512 code, as soon as the product is large enough for the sparse kernels; every multiple of 16 is right to
1e-5). Zero rows of the matrix change no result.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# Applied to a finite number they give a finite number, and they keep the last axis as it is.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Sigmoid", "Relu", "Tanh", "Erf", "Softplus"}
# The same, where the second input is one number.
_BY_A_NUMBER = {"Div", "Pow"}


@dataclass
class _Cone:
    """What computes a product's input, elementwise, from the outputs of other products."""

    tensors: set[str] = field(default_factory=set)
    products: list[Any] = field(default_factory=list)
    vectors: set[str] = field(default_factory=set)


def pad_products(model: Any, constants: dict[str, torch.Tensor], unit: int) -> None:
    """Bring the input width of every product with a constant matrix to a multiple of ``unit``, in place.

    Where the input comes elementwise from other products (the gate and the projection up of an MLP), those give more
    columns, from zero weights, and the graph has no further node. Elsewhere the input's first columns are repeated
    behind it; they meet zero weights (a Pad node would leave DeepSparse's own kernels).

    Args:
        model: an ONNX model; ``constants`` are its weights by name.
    """
    wanted = [node for node in model.graph.node if _is_product(node, constants) and _width(node, constants) % unit]
    if not wanted:
        return
    graph = _Graph(model, constants)
    padded: dict[str, str] = {}
    before: dict[str, tuple[str, int, int]] = {}
    matrices: dict[str, tuple[int, int]] = {}
    for node in wanted:
        value, width = node.input[0], _width(node, constants)
        extra = -width % unit
        matrices[node.input[1]] = _in_axis(node), extra
        if value not in padded:
            cone = graph.cone(value, width)
            if cone is None:
                before[node.output[0]] = value, width, extra
                padded[value] = f"{value}.padded"
            else:
                padded[value] = value
                for product in cone.products:
                    name = product.input[1]
                    constants[name] = _add_zeros(constants[name], 1 - _in_axis(product), extra)
                for vector in cone.vectors:
                    constants[vector] = _add_zeros(constants[vector], 0, extra)
        node.input[0] = padded[value]
    for name, (axis, extra) in matrices.items():
        constants[name] = _add_zeros(constants[name], axis, extra)
    _widen(model, before)


class _Graph:
    """Who writes and who reads each value."""

    def __init__(self, model: Any, constants: dict[str, torch.Tensor]) -> None:
        self.constants = constants
        self.writer = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {entry.name for entry in model.graph.output}

    def cone(self, value: str, width: int) -> _Cone | None:
        """The elementwise work behind a product's input, down to other products; None where anything else is in it."""
        cone = _Cone()
        pending = [value]
        while pending:
            name = pending.pop()
            if name in cone.tensors:
                continue
            cone.tensors.add(name)
            node = self.writer.get(name)
            if node is None or name in self.outputs:
                return None
            if _is_product(node, self.constants):
                # Its matrix gives these columns to nobody else.
                if any(len(self.readers[constant]) > 1 for constant in node.input[1:]):
                    return None
                cone.products.append(node)
                cone.vectors.update(node.input[2:])
            elif node.op_type in _ELEMENTWISE or (node.op_type in _BY_A_NUMBER and self._is_number(node.input[1])):
                for source in node.input:
                    vector = self.constants.get(source)
                    if self._is_number(source):
                        continue
                    if vector is None:
                        pending.append(source)
                    elif vector.shape == (width,) and len(self.readers[source]) == 1:
                        cone.vectors.add(source)
                    else:
                        return None
            else:
                return None
        # Nobody else may see the further columns; those who read the input itself are products that grow with it.
        inside = all(
            set(reader.output) <= cone.tensors for name in cone.tensors - {value} for reader in self.readers[name]
        )
        grow = all(_is_product(reader, self.constants) for reader in self.readers[value])
        return cone if cone.products and inside and grow else None

    def _is_number(self, name: str) -> bool:
        if name in self.constants:
            return self.constants[name].numel() == 1
        node = self.writer.get(name)
        if node is None or node.op_type != "Constant":
            return False
        return all(not attribute.t.dims or int(np.prod(attribute.t.dims)) == 1 for attribute in node.attribute)


def _is_product(node: Any, constants: dict[str, torch.Tensor]) -> bool:
    """Whether a node multiplies its first input by a constant matrix."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] in constants:
        return False
    return node.input[1] in constants and constants[node.input[1]].dim() == 2


def _in_axis(node: Any) -> int:
    """The axis of a product's matrix that runs over its inputs."""
    return int(any(attribute.name == "transB" and attribute.i for attribute in node.attribute))


def _width(node: Any, constants: dict[str, torch.Tensor]) -> int:
    return constants[node.input[1]].shape[_in_axis(node)]


def _add_zeros(tensor: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    shape = [count if at == axis else size for at, size in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _widen(model: Any, before: dict[str, tuple[str, int, int]]) -> None:
    """Repeat the first columns of a value before the product, known by its output, that already reads the result.

    Args:
        before: output of the product -> the value, its width and how many columns to add.
    """
    import onnx

    make = onnx.helper.make_node
    nodes = []
    for node in model.graph.node:
        if node.output[0] in before:
            value, width, extra = before[node.output[0]]
            parts = [value] * (1 + extra // width)
            if extra % width:
                ends = {"start": 0, "end": extra % width, "axis": -1}
                for name, number in ends.items():
                    constant = onnx.numpy_helper.from_array(np.array([number], np.int64), f"{value}.{name}")
                    model.graph.initializer.append(constant)
                parts.append(f"{value}.first")
                nodes.append(make("Slice", [value, *(f"{value}.{name}" for name in ends)], [parts[-1]]))
            nodes.append(make("Concat", parts, [f"{value}.padded"], axis=-1))
        copy = type(node)()
        copy.CopyFrom(node)
        nodes.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
