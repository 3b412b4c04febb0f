"""``reconstruct``: the same masks, better weights, recorded in the manifest, refused where it cannot be."""

from pathlib import Path

import pytest
import torch

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_model
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import prune_and_recover
from tests.small_models import save_model


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "dense"))


@pytest.fixture
def calibration(tmp_path: Path) -> CalibrationOptions:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return CalibrationOptions(data=str(path), sequences=3, length=32)


def test_magnitudes_mask_gets_better_weights(tmp_path: Path, source: str, calibration: CalibrationOptions) -> None:
    runs = {}
    for name, reconstruct in (("plain", False), ("fitted", True)):
        asked = PruneOptions(pattern="2:4", method="magnitude", reconstruct=reconstruct, calibration=calibration)
        runs[name] = prune(source, tmp_path / name, asked, RunOptions(device="cpu"))
    assert runs["fitted"].request["prune"]["reconstruct"] is True
    assert runs["plain"].calibration is None
    assert runs["fitted"].calibration is not None
    assert (tmp_path / "plain" / MASKS).read_bytes() == (tmp_path / "fitted" / MASKS).read_bytes()
    assert all((module.loss or 0) > 0 for module in runs["fitted"].modules.values())
    tokens = torch.arange(32).reshape(1, 32) + 64
    dense, plain, fitted = (
        load_model(folder)(input_ids=tokens).logits
        for folder in (Path(source), tmp_path / "plain", tmp_path / "fitted")
    )
    assert not torch.equal(plain, fitted)
    assert torch.isfinite(dense - fitted).all()


def test_a_recovery_that_prunes_itself_refuses_it(tmp_path: Path, source: str, calibration: CalibrationOptions) -> None:
    asked = PruneOptions(sparsity=0.5, method="wanda", reconstruct=True, calibration=calibration)
    with pytest.raises(UserError, match="sparselo does its own pruning"):
        prune_and_recover(source, tmp_path / "out", asked, RecoverOptions(method="sparselo"), RunOptions(device="cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reconstruct", [False, True])
def test_llm_compressors_folder_names_what_its_recipe_leaves_out(
    tmp_path: Path, source: str, calibration: CalibrationOptions, reconstruct: bool
) -> None:
    asked = PruneOptions(sparsity=0.5, method="wanda", reconstruct=reconstruct, calibration=calibration)
    prune(source, tmp_path / "pruned", asked, RunOptions(device="cpu"))
    export_checkpoint(tmp_path / "pruned", "llmcompressor", tmp_path / "out")
    assert ("--reconstruct" in (tmp_path / "out" / "README.md").read_text()) is reconstruct
