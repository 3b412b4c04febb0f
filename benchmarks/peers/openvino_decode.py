"""One process of OpenVINO: an ONNX artifact with its cache inside, timed on a prompt and the tokens after it.

    python openvino_decode.py ARTIFACT PRECISION PROMPT_LENGTH NEW_TOKENS BATCH [BATCH ...]

ARTIFACT is what ``sparsedeploy export --target onnxruntime`` wrote. PRECISION: float32, int8 or int4, the weights as
``nncf.compress_weights`` makes them (symmetric, int4 in groups of 64). Needs openvino and nncf. Prints one JSON object:
tokens a second of all sequences, seconds to load and resident megabytes.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino._offline_transformations import apply_make_stateful_transformation

WEIGHTS = {"int8": ("INT8_SYM", {}), "int4": ("INT4_SYM", {"group_size": 64})}


def load(file: Path, precision: str, batch: int) -> Any:
    """The compiled model; what it has seen is kept inside of it."""
    model = ov.Core().read_model(file)
    shapes = {}
    for each in model.inputs:
        shape = each.get_partial_shape()
        shape[0] = batch
        shapes[each.any_name] = shape
    model.reshape(shapes)
    if precision in WEIGHTS:
        import nncf

        mode, options = WEIGHTS[precision]
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **options)
    past = [name for name in shapes if name.startswith("past_key_values")]
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in past})
    return ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})


def run(compiled: Any, prompt: int, new_tokens: int, batch: int) -> tuple[float, list[float]]:
    """Seconds of the prompt, and of each new token."""
    request = compiled.create_infer_request()
    names = {each.any_name for each in compiled.inputs}
    tokens = np.array([[(17 * index + 5) % 1000 for index in range(prompt)]] * batch, dtype=np.int64)
    times, seen = [], 0
    for _ in range(new_tokens + 1):
        feed = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, seen + tokens.shape[1]), dtype=np.int64),
            "position_ids": np.tile(np.arange(seen, seen + tokens.shape[1], dtype=np.int64), (batch, 1)),
        }
        started = time.perf_counter()
        logits = request.infer({name: value for name, value in feed.items() if name in names})["logits"]
        chosen = logits[:, -1].argmax(-1)
        times.append(time.perf_counter() - started)
        seen += tokens.shape[1]
        tokens = chosen[:, None].astype(np.int64)
    return times[0], times[1:]


def main() -> None:
    folder, precision, prompt, new_tokens, *batches = sys.argv[1:]
    found: dict[str, float] = {}
    for batch in map(int, batches):
        started = time.perf_counter()
        compiled = load(Path(folder) / "model.onnx", precision, batch)
        found.setdefault("load", time.perf_counter() - started)
        run(compiled, int(prompt), 4, batch)
        prefill, decode = run(compiled, int(prompt), int(new_tokens), batch)
        found[f"prefill {batch}"] = batch * int(prompt) / prefill
        found[f"decode {batch}"] = batch / statistics.median(decode)
    found["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main()
