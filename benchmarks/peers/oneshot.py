"""Prune a model with ``llmcompressor.oneshot`` in llm-compressor's own environment and report time and memory.

    python oneshot.py MODEL RECIPE TOKENS.npy OUTPUT

Prints one JSON line: seconds of loading, pruning and saving, and peak memory in bytes, and that of the
imports alone.
"""

import json
import sys
import time

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from peak import peak_bytes
from transformers import AutoModelForCausalLM


def main() -> None:
    imports = peak_bytes()
    model_folder, recipe, tokens_file, output = sys.argv[1:]
    tokens = np.load(tokens_file)
    rows = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    loaded = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    pruned = time.perf_counter()
    model.save_pretrained(output)
    times = {"load": loaded - started, "prune": pruned - loaded, "save": time.perf_counter() - pruned}
    print(json.dumps({"seconds": times, "peak_bytes": peak_bytes(), "imports_bytes": imports}))


if __name__ == "__main__":
    main()
