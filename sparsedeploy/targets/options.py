"""What is exported for what: the options of ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsedeploy.options import Options, option
from sparsedeploy.registry import TARGETS


@dataclass(frozen=True)
class ExportOptions(Options):
    """What a model is exported for."""

    target: str = option(help="Target to export for: {choices}.", short="-t", choices=TARGETS.names)
    quantize: str | None = option(
        None,
        "Quantise the pruned weights too. vllm: fp8-dynamic, w8a8, w4a16; llamacpp: q8_0, q4_0, f16.",
    )
    options: Mapping[str, Any] | None = option(
        None, "For the target, such as max_positions=4096.", flag="--target-option"
    )
