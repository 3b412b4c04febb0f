"""Activations in memory or in a mapped file give the same results; the batch size follows the free memory."""

import pytest
import torch

from sparsedeploy.calibration import activations
from sparsedeploy.calibration.activations import choose_batch_size, new_buffer
from sparsedeploy.calibration.driver import LayerDriver
from tests.small_models import random_model

CPU = torch.device("cpu")


def test_a_mapped_file_holds_what_memory_holds() -> None:
    tokens = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(1))
    runs = []
    for keep in ("memory", "disk"):
        driver = LayerDriver(random_model("llama"), tokens, batch_size=2, keep=keep)
        runs.append([layer.outputs.clone() for layer in driver.iterate("sum_squares", changes_weights=False)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_buffer_on_disk_has_no_name_left(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations.tempfile, "tempdir", str(tmp_path))
    buffer = new_buffer((3, 4), torch.bfloat16, CPU, "disk")
    buffer[:] = 2
    assert buffer.sum() == 24
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]


def test_large_buffers_go_to_disk_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(activations, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(activations.progress, "note", notes.append)
    new_buffer((100,), torch.float32, CPU)
    assert notes == []
    assert new_buffer((200,), torch.float32, CPU).shape == (200,)
    assert len(notes) == 1


def test_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "free_bytes", lambda device: 10**9)
    assert choose_batch_size(128, 2048, 11008, CPU) == 1
    assert choose_batch_size(128, 256, 4096, CPU) == 4
    assert choose_batch_size(128, 256, 22016, CPU) == 2
    assert choose_batch_size(1, 512, 4096, CPU) == 1
    assert choose_batch_size(128, 128, 100_000, CPU) == 1
