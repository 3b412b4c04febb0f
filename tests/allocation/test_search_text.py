"""The text that a beta search selects on: validation by default, the test text only when asked (methods 5.4)."""

from pathlib import Path

import pytest
import torch

from sparsedeploy.allocation.atp import ATPOptions
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.models.loading import load_config, load_tokenizer
from sparsedeploy.pipeline import CalibrationOptions, selection_windows
from tests.small_models import save_model


@pytest.mark.parametrize("selection", ["validation", "test"])
def test_windows_come_from_the_named_split(tmp_path: Path, selection: str) -> None:
    folder = save_model(tmp_path / "model")
    asked = ATPOptions(search=True, selection=selection, windows=3)  # type: ignore[arg-type]
    windows = selection_windows(folder, load_config(folder), asked, CalibrationOptions(data="stdlib", length=64))
    text = "\n\n".join(load_documents("stdlib", split=selection))
    expected = load_tokenizer(folder)(text[:400], verbose=False)["input_ids"][: 3 * 64]
    assert torch.equal(windows.flatten(), torch.tensor(expected))


def test_another_text_can_be_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (tmp_path / "held_out.txt").write_text("abcdefgh" * 20)
    asked = ATPOptions(search=True, text=str(tmp_path / "held_out.txt"))
    windows = selection_windows(folder, load_config(folder), asked, CalibrationOptions(data="stdlib", length=32))
    assert windows.shape == (5, 32)
