"""The ``sparsedeploy`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer
from rich.console import Console

from sparsedeploy import progress
from sparsedeploy.cli.eval import eval_command
from sparsedeploy.cli.inspect import inspect_command
from sparsedeploy.cli.prune import prune_command
from sparsedeploy.errors import UserError
from sparsedeploy.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _print_version(value: bool) -> None:
    if value:
        print(f"sparsedeploy {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bars. Works after any command too.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Works after any command too.")] = False,
) -> None:
    """Make a Hugging Face causal LM sparse, keep it good, and ship it to a runtime that runs faster for it."""


app.command("prune")(prune_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)


def main() -> None:
    """Run the command line; exit code 0 on success, 2 for input that the user can mend, 1 for anything else."""
    arguments = sys.argv[1:]
    literal = arguments.index("--") if "--" in arguments else len(arguments)
    flags = {flag for flag in arguments[:literal] if flag in ("--debug", "--quiet", "-q")}
    arguments = [item for at, item in enumerate(arguments) if at >= literal or item not in flags]
    debug = "--debug" in flags
    progress.show(not flags & {"--quiet", "-q"})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        code = app(args=arguments, standalone_mode=False)
    except UserError as error:
        if debug:
            raise
        stderr.print(f"error: {error}", markup=False)
        code = 2
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        stderr.print("stopped")
        code = 130
    except Exception as error:
        if debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        stderr.print(f"error: unexpected {type(error).__name__}: {line[:400]}. Run again with --debug.", markup=False)
        code = 1
    sys.exit(code or 0)
