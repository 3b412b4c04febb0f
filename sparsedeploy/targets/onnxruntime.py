"""Export for ONNX Runtime in the layout of Optimum: written by Optimum itself, in the runtime's own environment.

``ORTModelForCausalLM.from_pretrained`` loads the folder. Optimum needs a transformers below 4.58, so it is given the
checkpoint with its settings in the words of that version; the result is checked against the model here, whichever
transformers is installed here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sparsedeploy import progress
from sparsedeploy.artifacts.companions import TOKENIZER_CONFIG, copy_companions, older_tokenizer
from sparsedeploy.artifacts.description import Artifact, Engine, Sparsity, config_shapes
from sparsedeploy.artifacts.known_answer import save_known_answer, tolerance
from sparsedeploy.artifacts.traffic import graph_bytes
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.machine import usable_cores
from sparsedeploy.models.structure import find_decoder_stack, plain_linears
from sparsedeploy.models.weight_files import small_files, weight_files
from sparsedeploy.options import Options, option
from sparsedeploy.reading import SOUND_COPY, read_object
from sparsedeploy.registry import TARGETS
from sparsedeploy.runtimes.environments import require
from sparsedeploy.runtimes.worker import Worker
from sparsedeploy.targets.base import ExportJob, describe
from sparsedeploy.targets.check import Reference, compare_logits, reference_logits, split_prompt
from sparsedeploy.targets.onnx_file import MODEL_FILE, import_onnx
from sparsedeploy.targets.switches import check_positions

RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class OnnxRuntimeOptions(Options):
    """Where Optimum runs."""

    python: str | None = option(
        None, "Python interpreter of your own environment with Optimum; None takes the managed one.", reads=True
    )
    timeout: float = option(3600.0, "Time limit of the export in seconds.", above=0)
    max_positions: int | None = option(
        None, "Maximum number of positions of the export; None takes the model's own.", at_least=2
    )


@TARGETS.register("onnxruntime", OnnxRuntimeOptions)
def export_onnxruntime(job: ExportJob, options: OnnxRuntimeOptions) -> Artifact:
    """An ONNX graph with a key/value cache in Optimum's layout, for ONNX Runtime.

    Raises:
        UserError: the runtime is not installed, Optimum cannot export the model, a graph that does not reproduce it or
            lacks one of its weights, quantised or non-finite weights, an adapter that is not merged, or no tokenizer.
    """
    import_onnx()
    environment = require(RUNTIME, options.python)
    opened = job.open()
    text = opened.config.get_text_config(decoder=True)
    limit = check_positions(f"{opened.config.model_type}", text, options.max_positions)
    model = opened.load()
    shapes = replace(config_shapes(opened.config), max_positions=limit)
    reference = reference_logits(model, limit)
    digests = _weight_digests(
        plain_linears(find_decoder_stack(model, opened.head_is_pruned).all_linears(), "an ONNX graph")
    )
    # Optimum loads the model once more: let go of it first.
    del model
    with job.new_folder() as folder, environment.worker(options.timeout) as worker:
        with tempfile.TemporaryDirectory() as scratch, progress.bar("export with Optimum", total=1) as advance:
            staged = stage_for_transformers_4(opened.folder, Path(scratch))
            opset = worker.call(
                "export", checkpoint=str(staged), output=str(folder), trust_remote_code=job.trust_remote_code
            )["opset"]
            # Optimum rewrites the tokenizer's files; the model's own are kept. config.json stays Optimum's.
            copy_companions(staged, folder, without=("config.json",))
            advance()
        sparsity = _find_weights(folder / MODEL_FILE, digests)
        check = compare_logits(_run(worker, folder, reference), reference)
        self_test = save_known_answer(folder, *reference.answer, tolerance("float32"))
        return describe(
            folder,
            opened,
            target=RUNTIME,
            shapes=shapes,
            dtype="float32",
            opset=opset,
            sparsity=sparsity,
            engine=Engine(name=RUNTIME, version=worker.ready["versions"]["onnxruntime"]),
            check=check,
            bytes_per_token=graph_bytes(folder / MODEL_FILE, sparse=False),
            self_test=self_test,
        )


def stage_for_transformers_4(checkpoint: Path, folder: Path) -> Path:
    """Link a checkpoint's weights into an empty folder and copy the rest, settings written for transformers 4.57.

    transformers 4 ignores fields that it does not know: a rotary base under its new name would silently become 10000.
    """
    for path in small_files(checkpoint):
        shutil.copyfile(path, folder / path.name)
    for path in weight_files(checkpoint):
        (folder / path.name).symlink_to(path.resolve())
    for name, translate in (("config.json", _older_config), (TOKENIZER_CONFIG, older_tokenizer)):
        if (checkpoint / name).is_file():
            write_json(folder / name, translate(read_object(checkpoint / name, fix=SOUND_COPY)))
    return folder


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings under the names of transformers 4; the new ones stay beside them.

    A left-over ``quantization_config`` is dropped.
    """
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    rope = config.get("rope_parameters")
    if not rope:
        return config
    by_layer = {key: value for key, value in rope.items() if isinstance(value, dict)}
    full = by_layer.get("full_attention", rope)
    older = {"rope_theta": full.get("rope_theta", 10000.0), "rope_scaling": None}
    if full.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    if full.get("rope_type") == "longrope":
        # Three fields and no more; the length stands beside them.
        factors = {key: full[key] for key in ("short_factor", "long_factor") if key in full}
        older["rope_scaling"] = {"type": "longrope", **factors}
        if "original_max_position_embeddings" in full:
            older["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    if "partial_rotary_factor" in full:
        older["partial_rotary_factor"] = full["partial_rotary_factor"]
    if "sliding_attention" in by_layer:
        older["rope_local_base_freq"] = by_layer["sliding_attention"].get("rope_theta", 10000.0)
    return {**older, **config}


def _weight_digests(linears: dict[str, nn.Linear]) -> dict[str, tuple[str, str]]:
    """Module path -> SHA-256 of its float32 weight as it is and transposed. Factors of adapters are left out."""
    digests = {}
    for path, linear in progress.track(linears.items(), "hash the weights", total=len(linears)):
        weight = linear.weight.detach().float().numpy()
        digests[path] = (_digest(weight), _digest(weight.T))
    return digests


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def _find_weights(path: Path, digests: dict[str, tuple[str, str]]) -> Sparsity:
    """Find every linear's weight in the graph, bit by bit, and count the zeros.

    The exporter gives constants numbers for names, so they are found by their contents.

    Raises:
        UserError: a linear whose weight is not one constant matrix of the graph.
    """
    onnx = import_onnx()
    graph = onnx.load(path, load_external_data=False).graph
    factors = {name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in factors and len(tensor.dims) == 2]
    found = {}
    for tensor in progress.track(tensors, "compare the weights", total=len(tensors)):
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        found[_digest(array)] = (array.size, array.size - int(np.count_nonzero(array)))
    weights = zeros = 0
    for name, pair in digests.items():
        digest = next((digest for digest in pair if digest in found), None)
        if digest is None:
            raise UserError(
                f"the weights of {name} are not in the graph that Optimum wrote",
                "Use --target deepsparse, whose graph ONNX Runtime runs too.",
            )
        weights += found[digest][0]
        zeros += found[digest][1]
    return Sparsity(weights=weights, zeros=zeros)


def _run(worker: Worker, folder: Path, reference: Reference) -> np.ndarray:
    """Logits [1, R, V] of the exported model: the prompt, then token by token with the cache."""
    prompt, rest = split_prompt(reference)
    sizes = {"prompt_length": len(prompt), "new_tokens": len(rest), "chunk": len(prompt)}
    model = worker.call("load", folder=str(folder), cores=usable_cores(), **sizes)["model"]
    result = worker.call("logits", model=model, prompt=prompt, tokens=rest, folder=str(worker.folder))
    arrays = worker.arrays(result)
    return np.concatenate([arrays["prefill"], arrays["decode"]])[None, reference.rows]
