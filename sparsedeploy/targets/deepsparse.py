"""Export for DeepSparse 1.8.0: an ONNX graph with a key/value cache, and the files around it.

DeepSparse sparsifies constant matrices by itself when it compiles the graph, so pruned weights go in as they are. The
option ``int8`` computes the pruned linears in 8-bit integers as well, see ``sparsedeploy/targets/int8_graph.py``.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sparsedeploy.artifacts.companions import copy_companions
from sparsedeploy.artifacts.description import (
    Artifact,
    Engine,
    Quantization,
    Shapes,
    Sparsity,
)
from sparsedeploy.artifacts.folder import Checkpoint
from sparsedeploy.artifacts.known_answer import save_known_answer, tolerance
from sparsedeploy.artifacts.traffic import graph_bytes
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.text import draw_sequences, recorded_tokens, text_of
from sparsedeploy.checkpoint.manifest import MANIFEST, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack, plain_linears
from sparsedeploy.options import Options, option
from sparsedeploy.plan import layer_number
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.registry import TARGETS
from sparsedeploy.targets.base import ExportJob, describe
from sparsedeploy.targets.check import (
    check_graph,
    check_integers,
    graph_perplexity,
    reference_logits,
)
from sparsedeploy.targets.int8_graph import Range, activation_ranges, fake_quantize, write_int8
from sparsedeploy.targets.kv_graph import KVCacheGraph
from sparsedeploy.targets.onnx_file import (
    DATA_FILE,
    LARGEST_SINGLE_FILE,
    MODEL_FILE,
    OPSET,
    count_weights,
    import_onnx,
    write_onnx,
)
from sparsedeploy.targets.spread import Rounding, moved, rounded, spread_of

ENGINE = Engine(name="deepsparse", version="1.8.0")
# Its sparse kernels are right for such input widths only, see sparsedeploy/targets/padding.py.
WIDTH_UNIT = 16


@dataclass(frozen=True)
class DeepSparseOptions(Options):
    """The graph's size and its integers."""

    int8: bool = option(False, "Compute the pruned linears in 8-bit integers, with ranges from the calibration text.")
    int8_keep: str | None = option(
        None,
        "Linears to keep in float32, by the ends of their names, separated by commas, such as `down_proj`.",
        only_with="int8",
    )
    data: str | None = option(
        None,
        "Calibration text; None takes the one that the checkpoint's manifest names.",
        only_with="int8",
        reads=True,
    )
    field: str | None = option(
        None,
        "Its text column, for JSONL rows and data sets; None takes the one that the manifest names.",
        only_with="int8",
    )
    sequences: int = option(
        16, "Number of its sequences that the ranges are measured on.", at_least=1, only_with="int8"
    )
    max_positions: int | None = option(
        None, "Maximum number of positions of the export; None takes the model's own.", at_least=2
    )
    windows: int = option(
        16,
        "Windows of the text's test split for the perplexity before and after; 0 skips it.",
        at_least=0,
        only_with="int8",
    )


@TARGETS.register("deepsparse", DeepSparseOptions)
def export_deepsparse(job: ExportJob, options: DeepSparseOptions) -> Artifact:
    """An ONNX graph with a key/value cache for the DeepSparse engine on CPUs.

    Raises:
        UserError: not a causal LM, an architecture that cannot be exported, quantised or non-finite weights, no
            tokenizer, or a graph that does not reproduce the model.
    """
    import_onnx()
    opened = job.open(adapters=True)
    model = opened.load()
    linears = plain_linears(find_decoder_stack(model, opened.head_is_pruned).all_linears(), "an ONNX graph")
    # The small linears inside a linear are the factors of an adapter: dense by design, and not prunable.
    linears = {path: linear for path, linear in linears.items() if path.rpartition(".")[0] not in linears}
    graph = KVCacheGraph(model, options.max_positions)
    shapes = _shapes(graph)
    reference = answer = reference_logits(model, shapes.max_positions)
    # The output head stays in float32.
    inside = {path: linear for path, linear in linears.items() if layer_number(path) is not None}
    ranges, windows = _calibrate(opened, model, inside, options) if options.int8 else ({}, None)
    spread = np.zeros(len(reference.answer[0]))
    with job.new_folder() as folder:
        write_onnx(graph, folder, largest_single_file=LARGEST_SINGLE_FILE, width_unit=WIDTH_UNIT)
        counted = count_weights(folder / MODEL_FILE, linears)
        sizes = {name: linears[name].weight.numel() for name in ranges}
        if options.int8:
            fake_quantize(inside, ranges)
            answer = reference_logits(model, shapes.max_positions)
            edges: dict[nn.Module, Rounding] = {
                linears[name]: moved(found.high - found.low) for name, found in ranges.items()
            }
            spread = spread_of(model, answer, rounded(edges))
        # The engine of the check holds the weights once more: let go of the model's first.
        del graph, model, linears, inside
        gc.collect()
        check = check_graph(folder / MODEL_FILE, reference)
        quantization, new_zeros = None, 0
        if options.int8:
            quantization, new_zeros = _quantize(folder, ranges, sizes, windows, options)
            check = check_integers(folder / MODEL_FILE, answer, spread)
        copy_companions(opened.folder, folder)
        dtype = "int8" if options.int8 else "float32"
        self_test = save_known_answer(folder, *answer.answer, tolerance("float32"), spread)
        return describe(
            folder,
            opened,
            target="deepsparse",
            shapes=shapes,
            dtype=dtype,
            opset=OPSET,
            sparsity=Sparsity(weights=counted.weights, zeros=counted.zeros + new_zeros),
            engine=ENGINE,
            check=check,
            quantization=quantization,
            bytes_per_token=graph_bytes(folder / MODEL_FILE, sparse=True),
            self_test=self_test,
        )


def _calibrate(
    opened: Checkpoint, model: Any, linears: dict[str, nn.Linear], options: DeepSparseOptions
) -> tuple[dict[str, Range], np.ndarray | None]:
    """Ranges of the inputs of the linears that become integers, and windows [N, T] of the test text."""
    ends = tuple(end.strip() for end in (options.int8_keep or "").split(",") if end.strip())
    chosen = {name: linear for name, linear in linears.items() if not (ends and name.endswith(ends))}
    if not chosen:
        raise UserError("int8_keep leaves no linear to compute in integers", "Name fewer, or leave int8 out.")
    if any(isinstance(child, nn.Linear) for linear in chosen.values() for child in linear.modules() if child != linear):
        raise UserError("an adapter that is not merged cannot be computed in integers", "Merge it first.")
    manifest = load_manifest(opened.folder) if (opened.folder / MANIFEST).is_file() else None
    data, field = text_of(manifest, options.data, options.field)
    if data is None:
        raise UserError(f"{opened.folder} names no calibration text", "Name one: --target-option data=TEXT.")
    if manifest is not None and options.data is None:
        tokens = recorded_tokens(opened.tokenizer, opened.config, manifest, field=options.field)
    else:
        wish = CalibrationOptions(data=data, field=field, sequences=options.sequences)
        tokens = draw_sequences(opened.tokenizer, opened.config, wish).tokens
    ranges = activation_ranges(model, chosen, tokens[: options.sequences])
    if options.windows == 0:
        return ranges, None
    windows = text_windows(data, opened.tokenizer, tokens.shape[1], field=field, limit=options.windows)
    return ranges, windows.numpy()


def _quantize(
    folder: Path,
    ranges: dict[str, Range],
    sizes: dict[str, int],
    windows: np.ndarray | None,
    options: DeepSparseOptions,
) -> tuple[Quantization, int]:
    """Replace the folder's float32 graph by the one in integers; also returns how many small weights became zero."""
    before = None if windows is None else graph_perplexity(folder / MODEL_FILE, windows)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".float-") as scratch:
        for name in (MODEL_FILE, DATA_FILE):
            if (folder / name).is_file():
                (folder / name).rename(Path(scratch) / name)
        counted = write_int8(Path(scratch) / MODEL_FILE, folder, ranges, sizes, largest_single_file=LARGEST_SINGLE_FILE)
    after = None if windows is None else graph_perplexity(folder / MODEL_FILE, windows)
    if counted.zeros < counted.float_zeros:
        raise UserError("a pruned weight is not zero after quantisation", "Please report this as a bug.")
    quantization = Quantization(
        scheme="w8a8-static",
        algorithm="round",
        group_size=None,
        pruned=counted.float_zeros,
        revived=0,
        perplexity_before=before,
        perplexity_after=after,
        text=options.data or "the calibration text",
    )
    return quantization, counted.zeros - counted.float_zeros


def _shapes(graph: KVCacheGraph) -> Shapes:
    config: Any = graph.config
    first = graph.cache_shapes[0]
    if any(shape != first for shape in graph.cache_shapes) or first.key_size != first.value_size:
        raise UserError(
            f"the layers of {type(graph.model).__name__} cache keys and values of different sizes",
            "DeepSparse needs the same number of key/value heads and head size in every layer.",
        )
    return Shapes(
        layers=len(graph.cache_shapes),
        kv_heads=first.heads,
        head_dim=first.key_size,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        max_positions=graph.max_positions,
    )
