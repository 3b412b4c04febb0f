"""Devices: the processor, or a CUDA device that is there."""

import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import resolve_device


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "cuda:", "cuda:x", "cuda:99999", "cpu:1", "", "tpu9"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown device '.*'\. Use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_known_names() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UserError, match="device 'cuda:99' is not on this machine"):
        resolve_device("cuda:99")
