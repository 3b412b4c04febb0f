"""Of a model that also sees, the language model is pruned and everything else is saved unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.models.loading import load_model
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.families import saved_family, small_model

FAMILIES = ("gemma3", "got_ocr2", "llava", "qwen2_vl", "paligemma", "idefics3", "mllama", "git")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_pruned(family: str, tmp_path: Path) -> None:
    dense, output = saved_family(family, tmp_path / "dense"), tmp_path / "out"
    prune(str(dense), output, PruneOptions(sparsity=0.5, method="magnitude"), RunOptions(device="cpu"))
    assert inspect_checkpoint(output).problems == []
    before, after = load_file(dense / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    pruned = {name for name in before if not torch.equal(before[name], after[name])}
    tower = re.compile("vision|visual|image|multi_modal|connector|projector")
    layers = re.compile(r"layers?\.\d+\..*weight$")
    assert pruned == {
        name
        for name, tensor in before.items()
        if layers.search(name) and not tower.search(name) and tensor.dim() == 2 and "norm" not in name
    }
    assert all(after[name].count_nonzero() * 2 == after[name].numel() for name in pruned)
    model = load_model(output)
    assert type(model) is type(small_model(family))
    tokens = torch.arange(3, 33)[None]
    assert torch.isfinite(model(input_ids=tokens, use_cache=False).logits).all()
