"""Zeros of the weights in an ONNX graph, for workers whose engine tells the time of every node. Needs onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

# As sparsedeploy/targets/onnx_file.py writes it.
PADDING = "padding of "


def count_zeros(graph: Path) -> dict[str, tuple[int, int]]:
    """Name of each product with a constant matrix, and name of its output -> weights and zeros of the matrix.

    The export says in the graph's metadata how many of a matrix are padding: they are no weights.
    """
    model = onnx.load(str(graph), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    padding = {entry.key: int(entry.value) for entry in model.metadata_props if entry.key.startswith(PADDING)}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            matrix = onnx.numpy_helper.to_array(tensors[node.input[1]], str(graph.parent))
            size = matrix.size - padding.get(PADDING + node.input[1], 0)
            found[node.name] = found[node.output[0]] = (size, size - int(np.count_nonzero(matrix)))
    return found
