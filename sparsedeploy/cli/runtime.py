"""``sparsedeploy runtime list|install|check|remove``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from sparsedeploy.cli.common import JsonOption, console, print_json
from sparsedeploy.cli.completion import complete_runtime
from sparsedeploy.cli.edge import Command
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.runtimes import environments
from sparsedeploy.runtimes.options import InstallOptions, RuntimeOptions

runtime_app = typer.Typer(no_args_is_help=True, help="Engines in environments of their own.")

NameArgument = Annotated[
    str, typer.Argument(help="Name of the runtime, such as deepsparse.", autocompletion=complete_runtime)
]


@runtime_app.command("list", cls=Command)
def list_command(json_output: JsonOption = False) -> None:
    """Show every runtime: whether it is installed, its versions and whether this machine can run it."""
    found = environments.list_runtimes()
    if json_output:
        print_json([status.to_json() for status in found])
        return
    table = Table()
    for header in ("runtime", "state", "Python", "versions", "on disk", "runs here"):
        table.add_column(header, overflow="fold")
    for status in found:
        table.add_row(
            status.name,
            status.state,
            status.python or "",
            "\n".join(f"{name} {version}" for name, version in status.versions.items()),
            _size(status.bytes) if status.bytes else "",
            "yes" if status.runnable else f"no: {status.reason}",
        )
    console.print(table)
    for status in found:
        console.print(f"{status.name}: {status.summary}", markup=False)


@runtime_app.command("install", cls=Command)
@takes(Section("install", InstallOptions))
def install_command(name: NameArgument, given: Given, json_output: JsonOption = False) -> None:
    """Make the runtime's environment; does nothing when it is there and complete."""
    asked = given.build("install", InstallOptions)
    status = environments.install(name, asked.python, asked.extra)
    if json_output:
        print_json(status.to_json())
        return
    versions = ", ".join(f"{name} {version}" for name, version in status.versions.items())
    console.print(
        f"{status.name} is installed: {versions}, Python {status.python}, {_size(status.bytes)}", markup=False
    )


@runtime_app.command("check", cls=Command)
@takes(Section("check", RuntimeOptions, without=("runtime", "dtype", "timeout")))
def check_command(name: NameArgument, given: Given, json_output: JsonOption = False) -> None:
    """Start the runtime, let it examine the processor and compute something."""
    report = environments.check(name, given.build("check", RuntimeOptions).python)
    if json_output:
        print_json(report.to_json())
        return
    table = Table(show_header=False)
    table.add_row("interpreter", f"{report.interpreter} (Python {report.python})")
    for distribution, version in report.versions.items():
        table.add_row(distribution, version)
    for fact, value in report.hardware.items():
        table.add_row(fact.replace("_", " "), str(value))
    table.add_row("product of two matrices", f"right, off by at most {report.largest_difference:.1e}")
    console.print(table)


@runtime_app.command("remove", cls=Command)
def remove_command(name: NameArgument, json_output: JsonOption = False) -> None:
    """Delete the runtime's environment."""
    freed = environments.remove(name)
    if json_output:
        print_json({"name": name, "freed_bytes": freed})
        return
    console.print(f"{name} is removed, {_size(freed)} freed", markup=False)


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
