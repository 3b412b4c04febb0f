"""``sparsedeploy card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import console


def card_command(
    folder: Annotated[Path, typer.Argument(help="Folder that prune or recover wrote.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Result of eval -o, of this folder or its base model. Repeatable."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a README.md that was edited or that sparsedeploy did not write; a copy is kept.",
        ),
    ] = False,
) -> None:
    """Write a pruned folder's model card, with measured perplexities."""
    from sparsedeploy.workflows.card import write_card

    path = write_card(folder, evaluations or [], overwrite=overwrite)
    console.print(f"{path} written", soft_wrap=True)
