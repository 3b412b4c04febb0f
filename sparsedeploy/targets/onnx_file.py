"""Write a key/value-cache graph as an ONNX file whose linear weights are plain 2-D constants."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.padding import pad_products

OPSET = 14
MODEL_FILE = "model.onnx"
DATA_FILE = "model.data"
# A protobuf message ends at 2 GiB; some room is left for the graph itself.
LARGEST_SINGLE_FILE = 2_000_000_000
_ALIGNMENT = 64
_WRAPPER = "model."  # the attribute of KVCacheGraph that holds the model: the exporter's names start with it
PADDING = "padding of "  # starts the metadata key that says how many elements of a constant are padding
TRANSPOSED = ".T"  # ends the name of a constant that is the transpose of the model's weight


@dataclass(frozen=True)
class WeightCount:
    """Prunable weights found in the graph, and how many of them are zero."""

    weights: int
    zeros: int


def write_onnx(
    graph: KVCacheGraph, folder: Path, *, largest_single_file: int = LARGEST_SINGLE_FILE, width_unit: int = 1
) -> list[str]:
    """Export the graph in float32 at opset 14 into an existing folder.

    A weight of the model becomes a constant of its name, or of its name and ``.T`` when the graph multiplies by the
    transpose. Constants come from the model's own tensors, one at a time.

    Args:
        largest_single_file: when the constants exceed this many bytes they go to ``model.data`` beside ``model.onnx``.
        width_unit: what the input width of every product must be a multiple of; zeros are added up to that.

    Returns:
        Names of the files written.

    Raises:
        UserError: the onnx package is missing, or the model cannot be traced.
        ValueError: a threshold above what one protobuf file can hold.
    """
    if largest_single_file > LARGEST_SINGLE_FILE:
        raise ValueError(f"one ONNX file holds at most {LARGEST_SINGLE_FILE} bytes")
    onnx = import_onnx()
    files = [MODEL_FILE]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trace-") as scratch:
        path = Path(scratch) / MODEL_FILE
        with progress.bar("trace the model", total=1) as advance:
            _trace(graph, path)
            advance()
        model = onnx.load(path)
    _check_inputs(graph, model)
    constants = _take_constants(graph, model)
    sizes = {name: tensor.numel() for name, tensor in constants.items()}
    pad_products(model, constants, width_unit)
    for name, tensor in constants.items():
        if tensor.numel() > sizes[name]:  # what counts weights in the graph leaves these out
            entry = model.metadata_props.add()
            entry.key, entry.value = PADDING + name.removeprefix(_WRAPPER), str(tensor.numel() - sizes[name])
    with ExitStack() as stack:
        data: BinaryIO | None = None
        if sum(tensor.nbytes for tensor in constants.values()) > largest_single_file:
            files.append(DATA_FILE)
            data = stack.enter_context(open(folder / DATA_FILE, "wb"))
        for name, tensor in progress.track(constants.items(), "write the weights", total=len(constants)):
            add_constant(model, name.removeprefix(_WRAPPER), tensor.numpy(), data)
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name in constants:
                node.input[at] = name.removeprefix(_WRAPPER)
    onnx.save(model, folder / MODEL_FILE)
    onnx.checker.check_model(str(folder / MODEL_FILE))
    return files


def count_weights(path: Path, linears: dict[str, nn.Linear]) -> WeightCount:
    """Find every linear in the graph, compare its constant bit by bit with the model's weight, and count the zeros.

    Rows and columns that were added as padding must be zero, and do not count.

    Args:
        linears: module path -> linear, as the model names them.

    Raises:
        UserError: a linear that is not one constant matrix of the graph, or differs from the model's.
    """
    onnx = import_onnx()
    model = onnx.load(path, load_external_data=False)
    factors = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in factors}
    weights = zeros = 0
    for name, linear in progress.track(linears.items(), "compare the weights", total=len(linears)):
        weight = linear.weight.detach().float().numpy()
        if f"{name}.weight" in constants:
            tensor, wanted = constants[f"{name}.weight"], weight
        elif f"{name}.weight{TRANSPOSED}" in constants:
            tensor, wanted = constants[f"{name}.weight{TRANSPOSED}"], weight.T
        else:
            raise UserError(
                f"{name} is not one constant matrix of the exported graph",
                "Its architecture cannot be exported: use one whose linears all run for every token.",
            )
        padded = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        found = np.ascontiguousarray(padded[tuple(map(slice, wanted.shape))])
        same = np.array_equal(found.view(np.int32), np.ascontiguousarray(wanted).view(np.int32))
        if not same or np.count_nonzero(padded) != np.count_nonzero(found):
            raise UserError(f"the exported weights of {name} differ from the model's", "Please report this as a bug.")
        weights += found.size
        zeros += found.size - int(np.count_nonzero(found))
    return WeightCount(weights=weights, zeros=zeros)


def import_onnx() -> Any:
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
        with torch.no_grad(), warnings.catch_warnings(), _silent_native_output():
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
                # The weights stay inputs by name: they are written from the model itself, once, after the trace.
                export_params=False,
                do_constant_folding=False,
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


@contextmanager
def _silent_native_output() -> Iterator[None]:
    """Keep standard output clean: the exporter's native code prints the whole graph there when it fails."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _check_inputs(graph: KVCacheGraph, model: Any) -> None:
    """The tracer drops an input that the model does not use: then positions or masks have no effect."""
    found = [entry.name for entry in model.graph.input]
    unused = [name for name in graph.input_names if name not in found]
    if unused:
        raise UserError(
            f"{type(graph.model).__name__} does not use {', '.join(unused)}",
            "Use a supported architecture such as Llama, Qwen, Mistral, OPT or Gemma.",
        )


def _take_constants(graph: KVCacheGraph, model: Any) -> dict[str, torch.Tensor]:
    """Take the weights out of the traced graph's inputs, and its Identity and Transpose nodes of weights with them.

    The exporter writes ``x @ transpose(weight)``, and an Identity where two weights are equal. An engine that
    sparsifies weights must see a constant matrix instead.

    Returns:
        Name in the graph -> contents, in the order of the model's weights; a transpose is a view.
    """
    weights = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    inputs = set(graph.input_names)
    constants = {entry.name: weights[entry.name].detach() for entry in model.graph.input if entry.name not in inputs}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = renamed.get(name, name)
        source = constants.get(node.input[0]) if node.input else None
        if node.op_type == "Identity" and source is not None:
            constants[node.output[0]] = weights.get(node.output[0], source).detach()
        elif node.op_type == "Transpose" and source is not None and source.dim() == 2:
            renamed[node.output[0]] = node.input[0] + TRANSPOSED
            constants[node.input[0] + TRANSPOSED] = source.T
        else:
            nodes.append(_copy(node))
    entries = [_copy(entry) for entry in model.graph.input if entry.name in inputs]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(entries)
    used = {name for node in nodes for name in node.input}
    return {name: tensor for name, tensor in constants.items() if name in used}


def add_constant(model: Any, name: str, array: np.ndarray, data: BinaryIO | None) -> None:
    """Add an initializer with its contents, or append them to the data file and point the initializer there."""
    onnx = import_onnx()
    tensor = model.graph.initializer.add()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    content = array.tobytes()
    tensor.raw_data = content if data is None else b""
    if data is not None:
        data.write(b"\0" * (-data.tell() % _ALIGNMENT))
        onnx.external_data_helper.set_external_data(tensor, DATA_FILE, offset=data.tell(), length=len(content))
        tensor.ClearField("raw_data")
        data.write(content)


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
