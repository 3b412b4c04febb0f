"""The shipped reference model: loads, is as good as recorded, and travels with the package."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.reference import reference_model
from sparsedeploy.reference.cache import SHIPPED
from sparsedeploy.reference.corpus import fingerprint, read_corpus
from sparsedeploy.reference.options import PRESETS, content_key
from sparsedeploy.reference.train import mean_loss, validation_windows

REPORT = json.loads((SHIPPED / "reference.json").read_text())


def test_perplexity_is_the_recorded_one() -> None:
    assert reference_model() == SHIPPED
    model = load_model(SHIPPED, dtype=torch.float32)
    documents = read_corpus()
    windows = validation_windows(load_tokenizer(SHIPPED), documents, REPORT["options"]["context"])
    perplexity = torch.tensor(mean_loss(model, windows)).exp().item()
    # Another Python has another standard library: nearly the same held-out text.
    same = fingerprint(documents) == REPORT["corpus"]["fingerprint"]
    assert perplexity == pytest.approx(REPORT["shipped"]["validation_perplexity"], rel=1e-3 if same else 0.25)
    # bfloat16 costs nothing that matters.
    trained = REPORT["result"]["validation_perplexity"]
    assert REPORT["shipped"]["validation_perplexity"] == pytest.approx(trained, rel=0.01)


def test_it_is_the_default_recipe_in_bfloat16() -> None:
    assert REPORT["content_key"] == content_key(PRESETS["default"], REPORT["corpus"]["fingerprint"])
    assert REPORT["shipped"]["command"] == "python -m sparsedeploy.reference.ship"
    model = load_model(SHIPPED, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == REPORT["result"]["parameters"]
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 12e6


def test_wheel_and_sdist_hold_it(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)], cwd=root, check=True)
    names = {f"sparsedeploy/reference/model/{path.name}" for path in SHIPPED.iterdir()}
    assert names <= set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert names <= {member.partition("/")[2] for member in archive.getnames()}
