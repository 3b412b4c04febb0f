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

# Every other option is a field of a dataclass. What a command works on, where its result goes and how that is printed
# are neither part of a request nor of a recipe, so they stand in the command's own signature.
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Output folder; it appears only when complete.")]
WorkFolderOption = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder; what an earlier run finished in it is kept.")
]
ResultOption = Annotated[Path | None, typer.Option("--output", "-o", help="File for the result as JSON.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]

# What is printed holds paths and names of modules: data, in which brackets mean nothing.
console = SafeConsole(highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
