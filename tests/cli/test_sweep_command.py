"""``sparsedeploy sweep``."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Outcome


@pytest.mark.slow
def test_it_fills_the_grid_and_picks(cli: Callable[..., Outcome], model: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    quality = {"data": str(text), "context": 32, "max_windows": 2}
    path.write_text(yaml.safe_dump({"model": str(model), "rates": ["2:4"], "methods": ["magnitude"], "eval": quality}))
    refused = cli("sweep", path, "-o", tmp_path / "other", "--pick", "the best")
    assert refused.code == 2
    assert "cannot read the wish" in refused.err
    assert refused.changed == []
    outcome = cli("sweep", path, "-o", tmp_path / "out", "--pick", "best below 1000 MB", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "magnitude-uniform-2of4" in outcome.out
    assert str(tmp_path / "out" / "magnitude-uniform-2of4" / "checkpoint") in outcome.out.replace("\n", "")
