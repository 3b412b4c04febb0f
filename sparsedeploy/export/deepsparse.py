"""Export for DeepSparse 1.8.0: a float32 ONNX graph with a key/value cache, and the files around it.

DeepSparse sparsifies constant matrices by itself when it compiles the graph, so pruned weights go in as they are.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.export.artifact import Artifact, Engine, Shapes, Source, Sparsity, hash_files, write_artifact
from sparsedeploy.export.check import check_graph, reference_logits
from sparsedeploy.export.companions import copy_companions
from sparsedeploy.export.kv_graph import KVCacheGraph
from sparsedeploy.export.onnx_file import LARGEST_SINGLE_FILE, MODEL_FILE, OPSET, count_weights, import_onnx, write_onnx
from sparsedeploy.export.targets import TARGETS
from sparsedeploy.folders import check_writable, new_folder
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, load_model, load_tokenizer, resolve_model
from sparsedeploy.models.structure import check_finite, find_decoder_stack

ENGINE = Engine(name="deepsparse", version="1.8.0")


@dataclass(frozen=True)
class DeepSparseOptions:
    """Options of the DeepSparse target.

    Attributes:
        largest_single_file: bytes of weights above which they go to ``model.data`` beside ``model.onnx``.
    """

    largest_single_file: int = LARGEST_SINGLE_FILE


@TARGETS.register("deepsparse", DeepSparseOptions)
def export_deepsparse(
    checkpoint: str | Path,
    output: Path,
    options: DeepSparseOptions | None = None,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Artifact:
    """An ONNX graph with a key/value cache for the DeepSparse engine on CPUs.

    Args:
        checkpoint: a Hugging Face model folder, dense or pruned, or a hub id.
        output: the folder to create.

    Raises:
        UserError: not a causal LM, an architecture that cannot be exported, quantised or non-finite weights, no
            tokenizer, a graph that does not reproduce the model, or an output folder that exists.
    """
    options = options or DeepSparseOptions()
    name = Path(checkpoint).expanduser().resolve().name
    checkpoint, output = resolve_model(checkpoint), Path(output)
    check_writable(output, overwrite)
    import_onnx()
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{checkpoint} is quantised", "Export the model before quantisation.")
    load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    source = Source(name=name, sha256=model_sha256(checkpoint))
    model = load_model(checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code)
    for path, parameter in model.named_parameters():
        check_finite(path.removesuffix(".weight"), parameter)
    linears = find_decoder_stack(model).all_linears()
    # The small linears inside a linear are the factors of an adapter: dense by design, and not prunable.
    linears = {path: linear for path, linear in linears.items() if path.rpartition(".")[0] not in linears}
    graph = KVCacheGraph(model)
    shapes = _shapes(graph)
    tokens, expected = reference_logits(model, shapes.vocab)
    with new_folder(output, overwrite=overwrite) as folder:
        write_onnx(graph, folder, largest_single_file=options.largest_single_file)
        counted = count_weights(folder / MODEL_FILE, linears)
        # The engine of the check holds the weights once more: let go of the model's first.
        del graph, model, linears
        gc.collect()
        check = check_graph(folder / MODEL_FILE, tokens, expected)
        copy_companions(checkpoint, folder)
        artifact = Artifact(
            target="deepsparse",
            source=source,
            model_type=config.model_type,
            shapes=shapes,
            dtype="float32",
            opset=OPSET,
            files=hash_files(folder),
            sparsity=Sparsity(weights=counted.weights, zeros=counted.zeros),
            engine=ENGINE,
            check=check,
        )
        write_artifact(folder, artifact)
    return artifact


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
