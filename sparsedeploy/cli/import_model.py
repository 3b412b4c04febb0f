"""``sparsedeploy import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, OutputOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.workflows.options import ImportOptions, RunOptions


@takes(
    Section("import", ImportOptions),
    Section("run", RunOptions, without=("device", "dtype", "resume", "trust_remote_code")),
)
def import_command(
    file: Annotated[Path, typer.Argument(help="GGUF file of a whole model.")],
    output: OutputOption,
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Convert a GGUF file to an ordinary model folder.

    The weights are dequantised, and the tokenizer is included.
    """
    from sparsedeploy.workflows.import_model import import_gguf

    run = given.build("run", RunOptions)
    record = import_gguf(file, output, given.build("import", ImportOptions), overwrite=run.overwrite)
    if as_json:
        print_json(record)
        return
    types = ", ".join(f"{count} {name}" for name, count in record["types"].items())
    weights = f"{record['weights'] / 1e6:,.0f} M weights in {record['dtype']} (from {types})"
    console.print(f"{output}: {record['architecture']}, {weights}", soft_wrap=True)
