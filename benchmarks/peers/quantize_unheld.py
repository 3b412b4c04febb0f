"""Quantise with llm-compressor's own ConstantPruningModifier in place of ours that holds its masks in ``oneshot``.

    python quantize_unheld.py MODEL SCHEME ALGORITHM TOKENS.npy MASKS.safetensors OUTPUT

Runs in llm-compressor's environment; prints one JSON line: what became of the pruned weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from llmcompressor.modifiers.pruning import ConstantPruningModifier
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "export" / "llmcompressor"))
import quantize
from replay import load


def main() -> None:
    folder, scheme, algorithm, tokens, masks, output = sys.argv[1:]
    quantize.HeldMasks = ConstantPruningModifier
    model = load(folder)
    kept = load_file(masks)
    quantize.quantize(model, scheme, algorithm, torch.from_numpy(np.load(tokens)), kept)
    model.save_pretrained(output, save_compressed=True)
    print(json.dumps(quantize.examine(output, kept, None)))


if __name__ == "__main__":
    main()
