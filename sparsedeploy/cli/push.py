"""``sparsedeploy push``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.workflows.options import PushOptions


@takes(Section("push", PushOptions))
def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder that prune, recover or export wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: OWNER/NAME. It is created if it does not exist.")],
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Verify a folder and upload it to the Hugging Face hub.

    HF_ENDPOINT sets another hub, HF_TOKEN the token.
    """
    from sparsedeploy.workflows.push import push

    pushed = push(folder, repo, given.build("push", PushOptions))
    if as_json:
        print_json(asdict(pushed))
        return
    console.print(f"{pushed.files} files, {pushed.bytes / 1e6:,.1f} MB: {pushed.url}", soft_wrap=True)
    console.print(f'load it: AutoModelForCausalLM.from_pretrained("{pushed.repo}")', soft_wrap=True)
