"""The speed probe: a random model with layers as wide as those that people deploy, dense and pruned, for an engine.

A small model cannot show what sparsity is good for: starting a product of a narrow layer takes as long as the product.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsedeploy import progress
from sparsedeploy.folders import new_folder
from sparsedeploy.models.loading import no_foreign_bars
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.reference import reference_model
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

# Llama-3.2-1B's layers, and as many of them as are made, exported and measured in two minutes on two cores; a small
# vocabulary, because the output head is not pruned and would only add the same time to both.
LAYERS = 2
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TITLE = f"random, {LAYERS} layers as in Llama-3.2-1B"
_WEIGHTS = 124_000_000
# Two checkpoints in bfloat16, two float32 exports of each engine, and what an export keeps beside it meanwhile.
_DISK, _MEMORY = 24 * _WEIGHTS, 16 * _WEIGHTS


def why_not(folder: Path) -> str | None:
    """Why the probe does not fit this machine, if it does not."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if shutil.disk_usage(place).free < _DISK:
        return f"The speed probe was left out: it needs {_DISK / 1e9:.0f} GB of disk."
    if psutil.virtual_memory().available < _MEMORY:
        return f"The speed probe was left out: it needs {_MEMORY / 1e9:.0f} GB of memory."
    return None


def probe_checkpoints(folder: Path, sparsity: float) -> dict[str, Path]:
    """Name -> checkpoint: the random model, and the same with its smallest weights pruned; kept for the next run."""
    dense, sparse = folder / "probe-dense", folder / f"probe-{100 * sparsity:g}"
    if not dense.is_dir():
        progress.note(f"     a model of {_WEIGHTS / 1e6:.0f} M random weights")
        with torch.random.fork_rng(devices=[]), new_folder(dense) as staging, no_foreign_bars():
            torch.manual_seed(0)
            config = LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=2)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(staging)
            load_tokenizer(reference_model()).save_pretrained(staging)
    if not sparse.is_dir():
        prune(str(dense), sparse, PruneOptions(sparsity=sparsity, method="magnitude"), RunOptions(resume=True))
    return {dense.name: dense, sparse.name: sparse}
