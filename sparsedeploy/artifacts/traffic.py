"""Bytes of weights that decoding one token at batch 1 must at least read, counted from an export's own tensors.

Every weight is read once, in the type in which it is stored: packed, quantised or as it is. Of an embedding only one
row is read, so it does not count, except where it is also the output head. An engine that makes sparse matrices of
dense ones by itself reads of each at least a bit for every weight, that says whether it is there, and the values that
are. The key/value cache and the activations are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

_PRODUCTS = {"MatMul", "Gemm", "MatMulInteger"}


def bitmask_bytes(size: int, nonzero: int, itemsize: int) -> int:
    """The least bytes of a matrix: as a bitmask with its values, or dense where that is smaller."""
    return min(size * itemsize, -(-size // 8) + nonzero * itemsize)


def graph_bytes(path: Path, *, sparse: bool) -> int:
    """Bytes that one token reads of an ONNX graph's constants.

    Args:
        sparse: whether the engine makes sparse matrices of the graph's dense ones.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    # A table that is looked up (an embedding, positions) gives single rows.
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    factors = {node.input[1] for node in graph.node if node.op_type in _PRODUCTS}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in looked_up:
            continue
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = int(np.prod(tensor.dims))
        if sparse and tensor.name in factors and len(tensor.dims) == 2:
            array = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
            total += bitmask_bytes(size, int(np.count_nonzero(array)), itemsize)
        else:
            total += size * itemsize
    return total


def folder_bytes(folder: Path, config: Any, *, trust_remote_code: bool = False) -> int:
    """Bytes that one token reads of a Hugging Face folder's stored tensors."""
    from accelerate import init_empty_weights
    from torch import nn

    from sparsedeploy.models.loading import auto_class
    from sparsedeploy.models.tensor_files import read_header
    from sparsedeploy.models.weight_files import weight_files

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    head = model.get_output_embeddings()
    looked_up = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    prefix = f"{model.base_model_prefix}."
    looked_up |= {name.removeprefix(prefix) for name in looked_up}
    tensors = [tensor for shard in weight_files(folder) for tensor in read_header(shard)]
    return sum(tensor.end - tensor.start for tensor in tensors if tensor.name not in looked_up)
