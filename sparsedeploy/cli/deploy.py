"""``sparsedeploy deploy``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from sparsedeploy.cli.common import DenseModelArgument, JsonOption, WorkFolderOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.cli.recover import take_recovery
from sparsedeploy.workflows.options import (
    CalibrationOptions,
    DataOptions,
    DeployOptions,
    PreviewOptions,
    RecoverOptions,
)

# What only counts where calibration text is read.
_SAMPLING = ("sequences", "length", "batch_size", "accumulate")


@takes(
    Section("deploy", DeployOptions),
    Section("preview", PreviewOptions),
    Section("calibration", CalibrationOptions, "Calibration text"),
    Section("recover", RecoverOptions, "Recovery", undecided=("method",)),
    Section("train", DataOptions, "Recovery"),
)
def deploy_command(
    model: DenseModelArgument,
    given: Given,
    output: WorkFolderOption = Path("deployed"),
    as_json: JsonOption = False,
) -> None:
    """From a model to a measured artifact, within a bound on quality.

    Finds the highest sparsity whose perplexity stays within the bound, exports it in the fastest format that stays
    within it too, and measures it against the dense model. Methods and allocations are compared from one calibration;
    what is chosen was pruned and measured at its rate. With --recover elsa or sparse-lora, higher rates are trained
    as well. If it is interrupted, run the same command again to resume; another target in the same folder reuses the
    search.
    """
    from sparsedeploy.workflows.deploy import deploy, plan
    from sparsedeploy.workflows.deploy_plan import choose_aim, shown_time
    from sparsedeploy.workflows.deploy_report import sentence
    from sparsedeploy.workflows.deploy_request import prepare, reads_calibration

    options = given.build("deploy", DeployOptions)
    unread: tuple[str, ...] = ()
    if not reads_calibration(options, choose_aim(options.target)):
        unread = _SAMPLING if options.held_out is None else ("data", *_SAMPLING)
    calibration = given.build("calibration", CalibrationOptions, without=unread)
    options = replace(options, calibration=calibration)
    preview = given.build("preview", PreviewOptions)
    recovery, why = None, "there is no --recover"
    if given.value("recover", "method") is not None:
        recovery, method = take_recovery(given, calibration.seed)
        why = f"{method.name} does not train"
    tried = " and ".join([*options.methods, *options.allocations])
    given.refuse_unread({"recover": why, "train": why, "calibration": f"{tried} read no calibration text"})
    options = replace(options, recovery=recovery)
    if preview.dry_run:
        steps = plan(prepare(model, output, options))
        if as_json:
            print_json(
                [{"step": one.name, "what": one.what, "seconds": one.seconds, "done": one.done} for one in steps]
            )
            return
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for header in ("step", "what", "about"):
            table.add_column(header, justify="right" if header == "about" else "left")
        for one in steps:
            table.add_row(one.name, one.what, "done" if one.done else shown_time(one.seconds))
        console.print(table)
        left = sum(one.seconds or 0 for one in steps if not one.done)
        console.print(f"about {shown_time(left)} in all, within a factor of two or three; nothing was written")
        return
    result = deploy(model, output, options, command=shlex.join(["sparsedeploy", *sys.argv[1:]]))
    if as_json:
        print_json(result)
        return
    console.print(sentence(result), soft_wrap=True)
    console.print(f"report: {result['report']}", soft_wrap=True)
