"""Zeros of the weights in an ONNX graph, for workers whose engine tells the time of every node. Needs onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx


def count_zeros(graph: Path) -> dict[str, tuple[int, int]]:
    """Name of each product with a constant matrix, and name of its output -> weights and zeros of the matrix."""
    model = onnx.load(str(graph), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            matrix = onnx.numpy_helper.to_array(tensors[node.input[1]], str(graph.parent))
            found[node.name] = found[node.output[0]] = (matrix.size, matrix.size - int(np.count_nonzero(matrix)))
    return found
