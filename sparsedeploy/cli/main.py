"""The ``sparsedeploy`` command."""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsedeploy import progress
from sparsedeploy.cli.allocate import allocate_command
from sparsedeploy.cli.bench import bench_command
from sparsedeploy.cli.card import card_command
from sparsedeploy.cli.demo import demo_command
from sparsedeploy.cli.deploy import deploy_command
from sparsedeploy.cli.edge import Command
from sparsedeploy.cli.eval import eval_command
from sparsedeploy.cli.export import export_command
from sparsedeploy.cli.generate import generate_command
from sparsedeploy.cli.import_model import import_command
from sparsedeploy.cli.inspect import inspect_command
from sparsedeploy.cli.process import Stop, no_foreign_messages, patient_streams, stoppable
from sparsedeploy.cli.prune import prune_command
from sparsedeploy.cli.push import push_command
from sparsedeploy.cli.recover import recover_command
from sparsedeploy.cli.runtime import runtime_app
from sparsedeploy.cli.serve import serve_command
from sparsedeploy.cli.sweep import sweep_command
from sparsedeploy.errors import UserError, hint_of
from sparsedeploy.folders import disk_error
from sparsedeploy.paths import shown
from sparsedeploy.processes import environment_processes
from sparsedeploy.registry import ALLOCATORS, PRUNERS, TARGETS
from sparsedeploy.version import __version__

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


# Typer brings its own copy of click or uses the installed one, by version: take the class from its public names.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]


def _print_version(value: bool) -> None:
    if value:
        print(f"sparsedeploy {__version__}")
        raise typer.Exit


# What a system says of a path that cannot be used, and not of a fault of ours.
_OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO}
# Names come from the registries, which know them without importing anything heavy.
_HELP = f"""Prune a Hugging Face causal LM, recover its quality, and ship it to a runtime that is measurably faster.

**Sparsity** is the fraction of zeros in the decoder's linear weights. The **method** chooses the weights
({", ".join(PRUNERS.names())}), the **allocation** spreads the sparsity over the layers
({", ".join(ALLOCATORS.names())}). The **pattern** is unstructured, or N of every M weights are kept (2:4, 4:8, 2:8).
A **target** is what a runtime loads ({", ".join(TARGETS.names())}).

sparsedeploy deploy MODEL --for cpu --within 5% && sparsedeploy serve ARTIFACT
"""


@app.callback(help=_HELP)
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, in any command.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, in any command.")] = False,
) -> None:
    """The command line; its help is :data:`_HELP`."""


_START, _MAKE, _CHECK, _SHIP = "Start here", "Prune", "Inspect and evaluate", "Deploy and benchmark"
app.command("demo", cls=Command, rich_help_panel=_START)(demo_command)
app.command("deploy", cls=Command, rich_help_panel=_START)(deploy_command)
app.command("import", cls=Command, rich_help_panel=_START)(import_command)
app.command("prune", cls=Command, rich_help_panel=_MAKE)(prune_command)
app.command("recover", cls=Command, rich_help_panel=_MAKE)(recover_command)
app.command("allocate", cls=Command, rich_help_panel=_MAKE)(allocate_command)
app.command("sweep", cls=Command, rich_help_panel=_MAKE)(sweep_command)
app.command("inspect", cls=Command, rich_help_panel=_CHECK)(inspect_command)
app.command("eval", cls=Command, rich_help_panel=_CHECK)(eval_command)
app.command("card", cls=Command, rich_help_panel=_CHECK)(card_command)
app.command("export", cls=Command, rich_help_panel=_SHIP)(export_command)
app.add_typer(runtime_app, name="runtime", rich_help_panel=_SHIP)
app.command("generate", cls=Command, rich_help_panel=_SHIP)(generate_command)
app.command("serve", cls=Command, rich_help_panel=_SHIP)(serve_command)
app.command("bench", cls=Command, rich_help_panel=_SHIP)(bench_command)
app.command("push", cls=Command, rich_help_panel=_SHIP)(push_command)


# Seconds that a process of a torchrun waits when it has failed: the launcher ends all as soon as one has ended, and the
# first must have said why.
_PATIENCE = 20


def main() -> None:
    """Run the command line; exit code 0 on success, 2 for input that the user can fix, 128 + N for signal N, else 1."""
    arguments = sys.argv[1:]
    literal = arguments.index("--") if "--" in arguments else len(arguments)
    flags = {flag for flag in arguments[:literal] if flag in ("--debug", "--quiet", "-q")}
    arguments = [item for at, item in enumerate(arguments) if at >= literal or item not in flags]
    debug = "--debug" in flags
    progress.show(not flags & {"--quiet", "-q"})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with patient_streams(), stoppable(), no_foreign_messages(not debug):
        code = _run(arguments, debug)
    if code and not _speaks():
        time.sleep(_PATIENCE)
    sys.exit(code)


def _speaks() -> bool:
    """Whether this is the first process of a torchrun, or the environment is of none."""
    try:
        return environment_processes().main
    except UserError:
        return True


def _run(arguments: list[str], debug: bool) -> int:
    """Run a command and report how it failed, if it did; returns the exit code."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

    def report(line: str, code: int) -> int:
        # The text of an error may come from a damaged or hostile file: it is printed as data, on one line.
        stderr.print(progress.printable(" ".join(line.split()), keep=""))
        return code

    try:
        if not environment_processes().main and not debug:  # the first process of a torchrun speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
        code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except UserError as error:
        if debug:
            raise
        return report(f"error: {error}{hint_of(error)}", 2)
    except _USAGE_ERROR as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "sparsedeploy"
        return report(f"error: {error.format_message().rstrip('.')}. See {command} --help.", 2)
    except Stop as error:
        return report(f"stopped.{hint_of(error)}", 128 + error.number)
    except (KeyboardInterrupt, typer.Abort) as error:
        return report(f"stopped.{hint_of(error)}", 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and (disk := disk_error(error)) is not None:
            return report(f"error: {disk[0]}. {disk[1]}{hint_of(error)}", 2)
        if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename:
            return report(
                f"error: cannot use {shown(os.fsdecode(error.filename))}: {error.strerror}. Give another path."
                f"{hint_of(error)}",
                2,
            )
        line = " ".join(str(error).split()) or type(error).__name__
        return report(
            f"error: unexpected {type(error).__name__}: {line[:400]}. Run again with --debug.{hint_of(error)}", 1
        )
