"""The text that a beta search selects on: validation by default, the test text only when asked."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.plan import prepare
from tests.small_models import save_model


def windows_for(folder: Path, length: int, asked: dict[str, Any]) -> torch.Tensor:
    options = PruneOptions(
        0.5,
        allocation="atp",
        allocation_options={"search": True, **asked},
        calibration=CalibrationOptions(data="stdlib", length=length, sequences=2),
    )
    prepared = prepare(str(folder), options)
    chosen = prepared.choice.options
    return prepared.selection_windows(chosen.text, chosen.selection, chosen.windows)


@pytest.mark.parametrize("selection", ["validation", "test"])
def test_windows_come_from_the_named_split(tmp_path: Path, selection: str) -> None:
    folder = save_model(tmp_path / "model")
    windows = windows_for(folder, 64, {"selection": selection, "windows": 3})
    text = "\n\n".join(load_documents("stdlib", split=selection))
    expected = load_tokenizer(folder)(text[:400], verbose=False)["input_ids"][: 3 * 64]
    assert torch.equal(windows.flatten(), torch.tensor(expected))


def test_another_text_can_be_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (tmp_path / "held_out.txt").write_text("abcdefgh" * 20)
    windows = windows_for(folder, 32, {"text": str(tmp_path / "held_out.txt")})
    assert windows.shape == (5, 32)
