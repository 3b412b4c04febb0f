"""2:4 weights in the format that vLLM 0.8 to 0.18 ran itself: compressed-tensors' ``sparse-24-bitmask``.

A linear's ``weight`` [out, in] becomes ``compressed`` [out, in / 2], the two kept values of every four in order;
``bitmask`` [out, in / 8] uint8, one bit for each weight, lowest bit first; and ``shape`` [2, 1] int64. vLLM multiplies
them on GPUs of compute capability 9.0 in float16 or bfloat16. Its support was removed in 2026: later versions refuse
such a checkpoint, and take the packed format of the sparsedeploy-vllm plugin instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsedeploy.errors import UserError

FORMAT = "sparse24"
VERSIONS = "0.8 to 0.18"
# Its own target: the vLLM that is managed here does not run it.
TARGET = "vllm-sparse24"
_KEEP, _GROUP, _BITS = 2, 4, 8


def compress(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three tensors of a linear, by the ends of their names; unpacked again and compared.

    Raises:
        UserError: more than two weights of a group of four are not zero, or the rows do not divide into bytes.
    """
    rows, columns = weight.shape
    if columns % _BITS:
        raise UserError(
            f"the rows of {name} have {columns} weights, not a multiple of {_BITS}", "Use --vllm-format auto."
        )
    groups = weight.reshape(rows, columns // _GROUP, _GROUP)
    if int((groups != 0).sum(dim=-1).max()) > _KEEP:
        raise UserError(
            f"{name} is not 2:4: more than two of four neighbouring weights are not zero",
            "Prune with --pattern 2:4, or use --vllm-format auto.",
        )
    # A stable order: where fewer than two are left, zeros fill the places, the first ones first.
    order = (groups == 0).int().argsort(dim=-1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :_KEEP], True).reshape(rows, columns)
    compressed = weight[mask].reshape(rows, columns // 2)
    bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    tensors = {
        "compressed": compressed.contiguous(),
        "bitmask": torch.from_numpy(bits),
        "shape": torch.tensor([[rows], [columns]]),
    }
    if not torch.equal(decompress(tensors), weight):
        raise UserError(f"{name} did not come back equal from its compressed form", "Report this as a bug.")
    return tensors


def decompress(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight [out, in]."""
    rows, columns = tensors["shape"].flatten().tolist()
    bits = np.unpackbits(tensors["bitmask"].numpy(), axis=-1, count=columns, bitorder="little")
    weight = torch.zeros(rows, columns, dtype=tensors["compressed"].dtype)
    weight[torch.from_numpy(bits).bool()] = tensors["compressed"].flatten()
    return weight


def configuration(sparsity: float, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of the checkpoint: nothing is quantised, the linears are sparse."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "quantization_status": "compressed",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "global_sparsity": sparsity,
            "targets": ["Linear"],
            "ignore": ignored,
            "registry_requires_subclass": False,
        },
    }
