"""What is exported for what: the options of ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparsedeploy.options import Options, option
from sparsedeploy.registry import TARGETS

# What the option ``quantize`` of a target takes. The targets import torch; the command line's help does not.
LlamacppScheme = Literal["q8_0", "q4_0", "f16"]
VllmScheme = Literal["fp8-dynamic", "w8a8", "w4a16"]
SCHEMES = {"vllm": VllmScheme, "llamacpp": LlamacppScheme}


@dataclass(frozen=True)
class ExportOptions(Options):
    """What a model is exported for."""

    target: str = option(help="Target to export for: {choices}.", short="-t", choices=TARGETS.names)
    quantize: str | None = option(
        None,
        "Quantise the pruned weights too. "
        + "; ".join(f"{target}: {', '.join(get_args(scheme))}" for target, scheme in SCHEMES.items())
        + ".",
    )
    options: Mapping[str, Any] | None = option(
        None,
        "For the target, such as max_positions=4096.",
        flag="--target-option",
        reads=("python", "model", "data", "text"),
    )
