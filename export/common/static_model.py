"""A torch model with a cache of fixed size, so that a new token runs the same code on the same memory every time.

With ``SPARSEDEPLOY_TORCH=compiled`` that code is compiled by ``torch.compile`` before the first prompt of a batch size:
a minute or more, after which torch itself takes less of a token's time. That pays for long runs and for servers.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from hf_model import HfModel
from transformers import StaticCache
from worker_protocol import BadRequest

VARIABLE = "SPARSEDEPLOY_TORCH"


class StaticModel(HfModel):
    """Runs one sequence, or in :meth:`measure` several equal ones, in a cache of ``capacity`` tokens."""

    def __init__(self, model: Any, capacity: int) -> None:
        super().__init__(model, capacity)
        wish = os.environ.get(VARIABLE, "eager")
        if wish not in ("eager", "compiled"):
            raise BadRequest(f"{VARIABLE} is '{wish}'", "Set it to eager or compiled.")
        self.caches: dict[int, StaticCache] = {}
        # Runs one new token of each sequence; None without compiled code.
        self.compiled = torch.compile(model, dynamic=False) if wish == "compiled" else None

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        if self.past is None:
            self.past = self._empty_cache(batch)
        run = self.compiled if length == 1 and self.compiled is not None else self.model
        logits: torch.Tensor = run(input_ids=ids, past_key_values=self.past, use_cache=True).logits
        return logits

    def _empty_cache(self, batch: int) -> StaticCache:
        """The cache of a batch size; with a new one, the code for its new tokens is compiled."""
        if batch not in self.caches:
            self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.capacity)
            ids = torch.zeros(batch, 1, dtype=torch.int64)
            # The first call makes the cache's memory, which compiled code must find there.
            for run in (self.model, self.compiled):
                if run is not None:
                    self._try(run, ids, self.caches[batch])
        self.caches[batch].reset()
        return self.caches[batch]

    def _try(self, run: Any, ids: torch.Tensor, cache: StaticCache) -> None:
        try:
            run(input_ids=ids, past_key_values=cache, use_cache=True)
        except Exception as error:
            if run is self.model:
                raise
            reason = " ".join(str(error).split())[:200]
            text = f"torch cannot compile this model ({type(error).__name__}: {reason}); it runs as it is"
            print(text, file=sys.stderr)
            self.compiled = None


def takes_static_cache(model: Any) -> bool:
    """Whether transformers promises that a model runs with a cache of fixed size."""
    return bool(getattr(model, "_can_compile_fullgraph", False))
