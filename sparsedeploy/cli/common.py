"""What the commands share: option types, printing, and how errors end the process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsedeploy.errors import UserError
from sparsedeploy.progress import SafeConsole

if TYPE_CHECKING:
    import torch

DenseModelArgument = Annotated[str, typer.Argument(help="Model folder or hub id.")]
ModelArgument = Annotated[str, typer.Argument(help="Model folder (dense or pruned) or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model folder's own Python code. Only for sources you trust."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Output folder; it appears only when complete.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this command.")]
DataFieldOption = Annotated[str, typer.Option("--data-field", help="Text field of JSONL rows and data sets.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Compute in float32, bfloat16 or float16; auto takes the checkpoint's own, or float32 where that is "
        "faster.",
    ),
]
_DTYPES = ("auto", "float32", "bfloat16", "float16")
CoresOption = Annotated[int | None, typer.Option("--cores", "-c", help="Cores to use [default: all].")]
RuntimePythonOption = Annotated[
    str | None, typer.Option("--python", help="Interpreter of an environment of your own that has the runtime.")
]

# What is printed holds paths and names of modules: data, in which brackets mean nothing.
console = SafeConsole(highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def named_dtype(name: str) -> str | None:
    """A type's name, checked; None for ``auto``.

    Raises:
        UserError: another name.
    """
    if name not in _DTYPES:
        raise UserError(f"unknown dtype '{name}'", f"Use one of {', '.join(_DTYPES)}.")
    return None if name == "auto" else name


def parse_dtype(name: str) -> torch.dtype | None:
    """The torch type of that name; None for ``auto``.

    Raises:
        UserError: another name.
    """
    import torch

    known = named_dtype(name)
    return None if known is None else getattr(torch, known)
