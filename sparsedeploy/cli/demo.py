"""``sparsedeploy demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from sparsedeploy.cli.common import JsonOption, WorkFolderOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.workflows.options import DemoOptions


@takes(Section("demo", DemoOptions))
def demo_command(
    given: Given,
    output: WorkFolderOption = Path("demo-output"),
    as_json: JsonOption = False,
) -> None:
    """The whole pipeline in one command, on a small model that is shipped.

    Takes a model, prunes it, measures its quality, exports it, runs it in DeepSparse (and in
    llama.cpp where that is installed), and reports what became faster, what it cost, and why.
    """
    from sparsedeploy.reporting.summary import notes, summary_table
    from sparsedeploy.workflows.demo import demo

    report = demo(output, given.build("demo", DemoOptions), command=shlex.join(["sparsedeploy", *sys.argv[1:]]))
    if as_json:
        print_json(report)
        return
    console.print(f"\n{report['about']}", soft_wrap=not console.is_terminal)
    console.print(summary_table(report))
    for line in notes(report):
        console.print(line, soft_wrap=not console.is_terminal)
    console.print(f"report: {output / 'report.html'} and {output / 'report.json'}", soft_wrap=True)
