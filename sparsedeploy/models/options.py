"""How a model is loaded, decided in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsedeploy.options import Options, option

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_HELP = "Compute in this type; auto takes the checkpoint's own, or float32 where that is faster."


@dataclass(frozen=True)
class LoadOptions(Options):
    """How a model is loaded."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    dtype: Dtype = option("auto", DTYPE_HELP)
    trust_remote_code: bool = option(False, "Run the model folder's own Python code. Only for sources you trust.")

    @property
    def torch_device(self) -> torch.device:
        """The device; see :func:`~sparsedeploy.models.computing.resolve_device`."""
        from sparsedeploy.models.computing import resolve_device

        return resolve_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The type to compute in; None leaves it to the checkpoint and the processor."""
        import torch

        return None if self.dtype == "auto" else getattr(torch, self.dtype)
