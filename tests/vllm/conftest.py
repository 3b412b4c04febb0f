"""The plugin's package is used from the checkout: only vLLM itself needs it installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "export" / "vllm"
sys.path.insert(0, str(PLUGIN))


@pytest.fixture(scope="session", autouse=True)
def _kernels_in_their_own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled kernels are kept for the session only, so that they are always compiled from the tree's source."""
    from sparsedeploy_vllm import cpu

    folder = tmp_path_factory.getbasetemp().parent / "sparsedeploy-kernels"
    folder.mkdir(exist_ok=True)
    cpu.cache_home = lambda: folder  # type: ignore[attr-defined]
