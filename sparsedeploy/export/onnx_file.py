"""Write a key/value-cache graph as an ONNX file whose linear weights are plain 2-D constants."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.export.kv_graph import KVCacheGraph

if TYPE_CHECKING:
    import onnx

OPSET = 14
MODEL_FILE = "model.onnx"
DATA_FILE = "model.data"
# A protobuf message ends at 2 GiB; some room is left for the graph itself.
LARGEST_SINGLE_FILE = 2_000_000_000
_ALIGNMENT = 64
_WRAPPER = "model."  # the attribute of KVCacheGraph that holds the model: the exporter's names start with it


@dataclass(frozen=True)
class WeightCount:
    """Prunable weights found in the graph, and how many of them are zero."""

    weights: int
    zeros: int


def write_onnx(graph: KVCacheGraph, folder: Path, *, largest_single_file: int = LARGEST_SINGLE_FILE) -> list[str]:
    """Export the graph in float32 at opset 14 into an existing folder.

    Args:
        largest_single_file: when the constants exceed this many bytes they go to ``model.data`` beside ``model.onnx``.

    Returns:
        Names of the files written.

    Raises:
        UserError: the onnx package is missing, or the model cannot be traced.
        ValueError: a threshold above what one protobuf file can hold.
    """
    if largest_single_file > LARGEST_SINGLE_FILE:
        raise ValueError(f"one ONNX file holds at most {LARGEST_SINGLE_FILE} bytes")
    onnx = import_onnx()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trace-") as scratch:
        raw = Path(scratch) / MODEL_FILE
        with progress.bar("trace the model", total=1) as advance:
            _trace(graph, raw)
            advance()
        model = onnx.load(raw, load_external_data=False)
        _inline_identities(model)
        _fold_transposes(model, raw.parent)
        _name_weights(model)
        size = sum(_byte_size(tensor) for tensor in model.graph.initializer)
        files = [MODEL_FILE]
        if size > largest_single_file:
            files.append(DATA_FILE)
            with open(folder / DATA_FILE, "wb") as data:
                for tensor in progress.track(model.graph.initializer, "write the weights"):
                    _move_outside(tensor, raw.parent, data)
        onnx.save(model, folder / MODEL_FILE)
    onnx.checker.check_model(str(folder / MODEL_FILE))
    return files


def count_weights(path: Path, linears: dict[str, nn.Linear]) -> WeightCount:
    """Find every linear in the graph, compare its constant bit by bit with the model's weight, and count the zeros.

    Args:
        linears: module path -> linear, as the model names them.

    Raises:
        UserError: a linear that is not one constant matrix of the graph, or differs from the model's.
    """
    onnx = import_onnx()
    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    in_graph = dict(_matrix_uses(model))
    weights = zeros = 0
    for name, linear in progress.track(linears.items(), "compare the weights", total=len(linears)):
        if name not in in_graph:
            raise UserError(
                f"{name} is not one constant matrix of the exported graph",
                "Its architecture cannot be exported: use one whose linears all run for every token.",
            )
        found = onnx.numpy_helper.to_array(constants[in_graph[name]], base_dir=str(path.parent))
        wanted = linear.weight.detach().float().numpy()
        # The exporter stores a matrix as MatMul takes it, [in, out]; as Gemm takes it, it stays [out, in].
        if not (_same_bits(found, wanted) or _same_bits(found, wanted.T)):
            raise UserError(f"the exported weights of {name} differ from the model's", "Please report this as a bug.")
        weights += found.size
        zeros += found.size - int(np.count_nonzero(found))
    return WeightCount(weights=weights, zeros=zeros)


def import_onnx() -> object:
    """The onnx package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.numpy_helper
    except ImportError as error:
        raise UserError("this export needs the onnx package", "Run: pip install 'sparsedeploy[onnx]'.") from error
    return onnx


def _trace(graph: KVCacheGraph, path: Path) -> None:
    inputs = graph.example_inputs()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer warns at each Python branch of the model's code; the numeric check after the export is what
            # tells a harmless one from a wrong one.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                inputs,
                str(path),
                input_names=graph.input_names,
                output_names=graph.output_names,
                dynamic_axes=graph.dynamic_axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except OSError:
        raise
    except Exception as error:
        if "No space left" in str(error):
            raise
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"{type(graph.model).__name__} cannot be traced to ONNX ({type(error).__name__}: {reason})",
            "Use a supported architecture such as Llama, Qwen, Mistral, OPT or Gemma.",
        ) from error


def _inline_identities(model: onnx.ModelProto) -> None:
    """Let nodes read a shared constant itself: the exporter puts an Identity where two weights are equal."""
    constants = {tensor.name for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    source = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs
    }
    kept = [node for node in model.graph.node if not node.output or node.output[0] not in source]
    for node in kept:
        for at, name in enumerate(node.input):
            node.input[at] = source.get(name, name)
    _replace_nodes(model, kept)


def _fold_transposes(model: onnx.ModelProto, folder: Path) -> None:
    """Turn a transpose of a constant matrix into a constant; the exporter leaves those that came after an Identity."""
    onnx = import_onnx()
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        source = constants.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is None:
            kept.append(node)
            continue
        order = list(node.attribute[0].ints) if node.attribute else None
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(source, base_dir=str(folder)).transpose(order))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
    _replace_nodes(model, kept)
    _drop_unused_constants(model)


def _name_weights(model: onnx.ModelProto) -> None:
    """Name constants after the model's modules, also those that the exporter numbered after transposing them."""
    renamed = {constant: f"{module}.weight" for module, constant in _matrix_uses(model)}
    taken: set[str] = set()
    final = {}
    for tensor in model.graph.initializer:
        name = renamed.get(tensor.name, tensor.name.removeprefix(_WRAPPER))
        if name in taken or (tensor.name not in renamed and name in renamed.values()):
            name = tensor.name
        taken.add(name)
        final[tensor.name] = name
        tensor.name = name
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = final.get(name, name)


def _matrix_uses(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """(module path, constant) for each MatMul or Gemm with a constant matrix, by the scope in the node's name."""
    constants = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in constants:
            scope = node.name.rpartition("/")[0]
            yield scope.strip("/").replace("/", ".").removeprefix(_WRAPPER), node.input[1]


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    if len(nodes) == len(model.graph.node):
        return
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _drop_unused_constants(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    for at in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[at].name not in used:
            del model.graph.initializer[at]


def _byte_size(tensor: onnx.TensorProto) -> int:
    onnx = import_onnx()
    return int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _move_outside(tensor: onnx.TensorProto, folder: Path, data: BinaryIO) -> None:
    """Append one constant's bytes to the data file and point the tensor there."""
    onnx = import_onnx()
    array = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
    content = array.tobytes()
    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
    for field in ("raw_data", "float_data", "int64_data", "external_data"):
        tensor.ClearField(field)
    tensor.raw_data = b""
    onnx.external_data_helper.set_external_data(tensor, DATA_FILE, offset=data.tell(), length=len(content))
    tensor.ClearField("raw_data")
    data.write(content)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a.view(np.int32), np.ascontiguousarray(b).view(np.int32)))
