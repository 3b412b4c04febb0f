"""``sparsedeploy card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import console
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.workflows.options import CardOptions


@takes(Section("card", CardOptions))
def card_command(
    folder: Annotated[Path, typer.Argument(help="Folder that prune or recover wrote.")],
    given: Given,
) -> None:
    """Write a pruned folder's model card, with measured perplexities."""
    from sparsedeploy.workflows.card import write_card

    asked = given.build("card", CardOptions)
    path = write_card(folder, asked.evaluations, overwrite=asked.overwrite)
    console.print(f"{path} written", soft_wrap=True)
