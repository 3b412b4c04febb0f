"""The ONNX Runtime side of sparsedeploy: exports with Optimum and runs what it wrote, in Optimum's environment.

A model is loaded and called through ``ORTModelForCausalLM``, as a user of Optimum does; the protocol is
``export/common/worker_protocol.py``.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

import numpy as np  # noqa: E402 - imported only after standard output has been redirected
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from cached_model import check_product  # noqa: E402
from hf_model import HfServer, usable_cores  # noqa: E402
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf  # noqa: E402
from onnxruntime_profile import profile_graph  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM  # noqa: E402

GRAPH = "model.onnx"
_DISTRIBUTIONS = ("optimum-onnx", "onnxruntime", "transformers", "torch")


def open_folder(folder: Path, cores: int, options: Any = None) -> Any:
    """An Optimum folder as its ``ORTModelForCausalLM``, with ``cores`` threads for an operator.

    Args:
        options: ``onnxruntime.SessionOptions`` to start from.
    """
    if not (folder / GRAPH).is_file():
        raise BadRequest(f"{folder} has no {GRAPH}", "Export the checkpoint again with sparsedeploy export.")
    torch.set_num_threads(cores)
    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    options.inter_op_num_threads = 1
    try:
        model = ORTModelForCausalLM.from_pretrained(
            folder,
            session_options=options,
            provider="CPUExecutionProvider",
            local_files_only=True,
            trust_remote_code=False,
        )
    except InvalidProtobuf as error:
        raise BadRequest(
            f"{folder / GRAPH} is not a whole ONNX graph",
            "Copy the folder again, or export the checkpoint again with sparsedeploy export.",
        ) from error
    # Optimum 0.1.0 gives the empty cache of some models, such as Gemma 2, the wrong sizes.
    shape = model.session.get_inputs()[model.input_names["past_key_values.0.key"]].shape
    assumed = [model.num_key_value_heads, model.embed_size_per_head]
    if [shape[1], shape[3]] != assumed:
        raise BadRequest(
            f"Optimum {version('optimum-onnx')} assumes {assumed[0]} key/value heads of size {assumed[1]} for a model "
            f"of type {model.config.model_type}, its graph has {shape[1]} of size {shape[3]}",
            "Use --target deepsparse, whose graph ONNX Runtime runs too, or a model that Optimum supports.",
        )
    return model


class Server(HfServer):
    """The operations of this engine, beside those on a loaded model."""

    def info(self) -> dict[str, Any]:
        """Versions and the cores that this process may use."""
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in _DISTRIBUTIONS},
            "hardware": {"provider": "CPUExecutionProvider", "cores": usable_cores()},
        }

    def check(self) -> dict[str, Any]:
        """Run a small matrix product and compare it with numpy."""

        def run(model: Any, values: np.ndarray) -> np.ndarray:
            session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            output: np.ndarray = session.run(None, {"x": values})[0]
            return output

        difference = check_product(run)
        if not difference < 1e-4:
            raise BadRequest(f"the engine computes a matrix product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    def export(self, checkpoint: str, output: str, trust_remote_code: bool) -> dict[str, Any]:
        """Write a checkpoint as a float32 graph with a key/value cache into an existing folder, in Optimum's layout.

        Returns:
            ``opset`` of the graph.
        """
        import onnx
        from optimum.exporters.onnx import main_export

        try:
            main_export(
                checkpoint,
                output,
                task="text-generation-with-past",
                dtype="fp32",
                do_validation=False,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                library_name="transformers",
            )
        except (MemoryError, OSError):
            raise
        except Exception as error:  # whatever its code says of a model that it was not written for
            reason = " ".join(str(error).split())[:240]
            if "custom or unsupported architecture" in reason:
                reason = "it has no ONNX export for its type"
            raise BadRequest(
                f"Optimum {version('optimum-onnx')} cannot export this model ({reason})",
                "Use --target deepsparse, whose graph ONNX Runtime runs too, or a model that Optimum supports.",
            ) from error
        graph = onnx.load(os.path.join(output, GRAPH), load_external_data=False)
        opset = max(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
        return {"opset": opset}

    def open(self, folder: Path, cores: int) -> Any:
        return open_folder(folder, cores)

    def profile(
        self, folder: str, phase: str, cores: int, prompt_length: int, new_tokens: int, chunk: int, seed: int
    ) -> dict[str, Any]:
        """The time of every operator, for the whole prompt or for one token after it."""
        length, cached = (1, prompt_length) if phase == "decode" else (prompt_length, 0)
        operators = profile_graph(open_folder, Path(folder), cores, cached, length, seed)
        tokens = "1 token" if length == 1 else f"{length} tokens at once"
        return {"what": f"{tokens} after {cached} in the cache", "operators": operators}


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
