"""What the commands share beside options: arguments, outputs and printing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsedeploy.progress import SafeConsole

DenseModelArgument = Annotated[str, typer.Argument(help="Model folder or hub id.")]
ModelArgument = Annotated[str, typer.Argument(help="Model folder (dense or pruned) or hub id.")]
ArtifactArgument = Annotated[Path, typer.Argument(help="Exported folder.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Output folder; it appears only when complete.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

# What is printed holds paths and names of modules: data, in which brackets mean nothing.
console = SafeConsole(highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
