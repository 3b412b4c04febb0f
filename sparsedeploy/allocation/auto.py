"""Auto: make every allocation's plan from one pass, prune by each from shared statistics, confirm the best.

A level is pruned from the dense model's statistics; in the end each layer is pruned from those that the pruned layers
before it leave. The order of close plans differs between the two, so the closest ones are pruned for real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sparsedeploy.allocation.base import Allocation
from sparsedeploy.calibration.driver import LayerContext
from sparsedeploy.options import Options, option
from sparsedeploy.plan import ModuleShape
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class SearchOptions(Options):
    """What a search over pruned levels compares on, and where it keeps them."""

    selection: Literal["validation", "test"] = option(
        "validation",
        "Split of the text that plans are compared on; with `test` the reported perplexity is optimistic.",
    )
    text: str | None = option(None, "Text to compare on; None takes the calibration source's own split.", reads=True)
    windows: int = option(
        16, "Number of its windows: the first quarter compares levels, all of them confirm the result.", at_least=1
    )
    confirm: int = option(
        3,
        "Number of plans, the closest by their levels, that are pruned layer after layer, as in the end, and compared "
        "again; uniform always is. 0 trusts the levels.",
        at_least=0,
    )
    database: str | None = option(
        None,
        "Folder of the pruned levels, for this model, method and text; None keeps them in the user's cache.",
        reads=True,
    )


class SearchedElsewhere:
    """What a search has in place of measurements: its plan needs pruned weights, which no allocator sees."""

    def __init__(self, options: SearchOptions) -> None:
        self.options = options

    def measure(self, layer: LayerContext) -> Any:
        raise NotImplementedError("a search measures pruned models, not layers")

    def allocate(self, measured: list[Any], layers: list[list[ModuleShape]], sparsity: float) -> Allocation:
        raise NotImplementedError("a search compares whole plans")


@dataclass(frozen=True)
class AutoOptions(SearchOptions):
    """What plans are compared on."""


@ALLOCATORS.register("auto", AutoOptions, needs="hessian", strength=None, searches=True)
class Auto(SearchedElsewhere):
    """The allocation whose pruned model stays closest to the dense one on held-out text."""
