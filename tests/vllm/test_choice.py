"""Packed or dense, decided when a layer is loaded."""

from __future__ import annotations

import pytest
import torch
from sparsedeploy_vllm import choice

from sparsedeploy.errors import UserError
from sparsedeploy.formats import bitmask
from tests.formats.test_packing import sparse_weight


def test_choice_measures_and_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = bitmask.pack(sparse_weight(64, 64, 0.6, torch.float32))
    measured = choice.measure(packed, torch.float32)
    assert measured.packed_ms > 0
    assert measured.packed == (measured.dense_ms >= 0.9 * measured.packed_ms)
    monkeypatch.setattr(
        choice,
        "measure",
        lambda weight, dtype, dense, batch: choice.Choice(packed=batch == 1, packed_ms=2.0, dense_ms=1.0, batch=batch),
    )
    assert choice.choose(packed, torch.float32).packed
    monkeypatch.setenv("SPARSEDEPLOY_CPU_BATCH", "64")
    assert not choice.choose(packed, torch.float32).packed
    assert "dense 1.000 ms at batch 64" in choice.choose(packed, torch.float32).reason
    monkeypatch.setenv("SPARSEDEPLOY_CPU_BATCH", "many")
    with pytest.raises(UserError, match="'many'"):
        choice.choose(packed, torch.float32)
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "packed")
    assert choice.choose(packed, torch.float32) == choice.Choice(packed=True)
    monkeypatch.setenv("SPARSEDEPLOY_CPU", "fast")
    with pytest.raises(UserError, match="'fast'"):
        choice.choose(packed, torch.float32)
