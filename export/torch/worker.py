"""PyTorch as a runtime: transformers runs a folder as it is, in the Python that sparsedeploy itself runs in.

The protocol is ``export/common/worker_protocol.py``.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "common"))
from worker_protocol import BadRequest, serve, take_standard_output

PROTOCOL = take_standard_output()

from sparsedeploy.startup import quick_start  # noqa: E402 - imported only after standard output has been redirected

quick_start()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hf_model import HfModel, HfServer, usable_cores  # noqa: E402
from static_model import StaticModel, takes_static_cache  # noqa: E402

from sparsedeploy.errors import UserError  # noqa: E402
from sparsedeploy.formats.hf import PackedLinear  # noqa: E402
from sparsedeploy.models.loading import load_model  # noqa: E402


class Server(HfServer):
    """The operations of this engine, beside those on a loaded model."""

    def info(self) -> dict[str, Any]:
        """Versions and the cores that this process may use."""
        return {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "hardware": {"instruction_set": torch.backends.cpu.get_cpu_capability(), "cores": usable_cores()},
        }

    def check(self) -> dict[str, Any]:
        """Run a small matrix product and compare it with numpy."""
        weights = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
        values = np.ones((1, 32), dtype=np.float32)
        found = (torch.from_numpy(values) @ torch.from_numpy(weights)).numpy()
        difference = float(np.abs(found - values @ weights).max())
        if not difference < 1e-4:
            raise BadRequest(f"torch computes a matrix product that is off by {difference:.3g}")
        return {**self.info(), "largest_difference": difference}

    dtype: torch.dtype | None = None

    def load(
        self,
        folder: str,
        cores: int,
        prompt_length: int,
        new_tokens: int,
        chunk: int,
        batch: int = 1,
        dtype: str | None = None,
    ) -> dict[str, Any]:
        """Load a folder to compute in ``dtype``; None takes the checkpoint's own, or float32 where that is faster."""
        self.dtype = getattr(torch, dtype) if dtype else None
        loaded = super().load(folder, cores, prompt_length, new_tokens, chunk, batch)
        model = self.models[loaded["model"]].model
        return {**loaded, "dtype": str(model.dtype).removeprefix("torch.")}

    def open(self, folder: Path, cores: int) -> Any:
        """The folder's model."""
        torch.set_num_threads(cores)
        try:
            model = load_model(folder, dtype=self.dtype)
        except UserError as error:
            raise BadRequest(error.message, error.fix) from error
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare(keep=False)
        return model

    def wrap(self, model: Any, capacity: int) -> HfModel:
        return StaticModel(model, capacity) if takes_static_cache(model) else HfModel(model, capacity)


if __name__ == "__main__":
    serve(Server(), PROTOCOL)
