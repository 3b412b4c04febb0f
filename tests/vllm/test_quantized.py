"""vLLM as it is, without the plugin's formats, runs what ``export --quantize`` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.calibration.text import calibration_set
from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_config, load_model
from sparsedeploy.quality.engine_perplexity import engine_perplexity
from sparsedeploy.quality.perplexity import perplexity
from sparsedeploy.reference import reference_model
from sparsedeploy.runtimes.engine import find_deployment, open_model
from sparsedeploy.runtimes.environments import require
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import save_model

TEXT = CalibrationOptions(data="stdlib", sequences=4, length=96)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("vllm", "llmcompressor"):
        try:
            require(name)
        except UserError as error:
            pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("pruned") / "model"
    prune(str(reference_model("tiny")), folder, PruneOptions(sparsity=0.5, calibration=TEXT), RunOptions(device="cpu"))
    return folder


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.llmcompressor
@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w8a8", "w4a16"])
def test_vllm_predicts_what_the_pruned_model_predicts(scheme: str, pruned: Path, tmp_path: Path) -> None:
    export_checkpoint(pruned, "vllm", tmp_path / "out", {"quantize": scheme, "windows": 0})
    tokens = calibration_set(pruned, load_config(pruned), TEXT).tokens[0]
    with torch.no_grad():
        expected = load_model(pruned)(tokens[None]).logits[0, :-1].log_softmax(dim=-1).numpy()
    with open_model(tmp_path / "out", prompt_length=len(tokens), new_tokens=1) as model:
        found, _ = model.logits(tokens[:-1].tolist(), tokens[-1:].tolist())
    chosen = np.arange(len(tokens) - 1), tokens[1:].numpy()
    # Cross-entropy in nats: quantisation moves it a little, a wrong scale or packing by far more.
    assert -found[chosen].mean() == pytest.approx(-expected[chosen].mean(), abs=0.05)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("context", [64, 128])
def test_perplexity_of_a_large_vocabulary(context: int, tmp_path: Path) -> None:
    """vLLM then tells the likeliest tokens only; and windows may be as long as the model's positions, 128."""
    try:
        require("vllm")
    except UserError as error:
        pytest.skip(str(error))
    save_model(tmp_path / "dense", vocab_size=6000, hidden_size=128, intermediate_size=176)
    prune(str(tmp_path / "dense"), tmp_path / "pruned", PruneOptions(sparsity=0.5, method="magnitude"))
    export_checkpoint(tmp_path / "pruned", "vllm", tmp_path / "packed")
    windows = torch.randint(0, 6000, (4, context), generator=torch.Generator().manual_seed(0))
    expected = perplexity(load_model(tmp_path / "pruned"), windows)
    found = engine_perplexity(find_deployment(tmp_path / "packed"), windows)
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, abs=0.01)
