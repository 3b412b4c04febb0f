"""``sparsedeploy recover``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsedeploy.cli.common import JsonOption, OutputOption, console, print_json
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.errors import UserError
from sparsedeploy.registry import RECOVERIES, Method
from sparsedeploy.workflows.options import (
    RECOVER_FLAGS,
    CalibrationOptions,
    DataOptions,
    RecoverOptions,
    RecoverRunOptions,
)

if TYPE_CHECKING:
    from sparsedeploy.checkpoint.manifest import Manifest

# The checkpoint's own values stand where none is typed.
_SECTIONS = (
    Section("recover", RecoverOptions, flags=RECOVER_FLAGS),
    Section("train", DataOptions, "Training text", without=("seed",)),
    Section("calibration", CalibrationOptions, "Calibration text, in place of the checkpoint's", undecided=True),
    Section("run", RecoverRunOptions),
)


@takes(*_SECTIONS)
def recover_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that sparsedeploy prune wrote.")],
    output: OutputOption,
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Recover a pruned model's quality inside its mask, by training small adapters or keeping a low-rank part."""
    from sparsedeploy.workflows.recover import reads_dense, recover_checkpoint

    run = given.build("run", RecoverRunOptions)
    options, method = take_recovery(given)
    calibration = given.take("calibration", without=("seed",)) if method.traits["calibrates"] else {}
    given.refuse_unread(
        {
            "recover": f"{method.name} does not train",
            "train": f"{method.name} does not train",
            "calibration": f"{method.name} reads no calibration text",
        }
    )
    if run.dense is not None and not reads_dense(options, method):
        raise UserError(f"--dense has no effect: {method.name} starts from the pruned model", "Leave it out.")
    manifest = recover_checkpoint(checkpoint, output, options, run, calibration=calibration)
    if as_json:
        values = manifest.to_json()
        print_json({"output": str(output), "achieved": values["achieved"], "recovery": values["recovery"]})
    else:
        print_recovery(output, manifest)


def take_recovery(given: Given, seed: int | None = None) -> tuple[RecoverOptions, Method[Any]]:
    """The recovery that was asked for, and its method; the training options are left where it does not train.

    Args:
        seed: where none is given for recovery.
    """
    method = RECOVERIES.get(given.value("recover", "method", RecoverOptions.method))
    trains = method.traits["trains"]
    values = given.take("recover", without=() if trains else ("training", "loss"))
    if seed is not None:
        values.setdefault("seed", seed)
    text = {"seed": values.get("seed", 0), **given.take("train")} if trains else {}
    data = DataOptions(**text) if text.get("data") else None
    return RecoverOptions(**values, data=data), method


def print_recovery(output: Path, manifest: Manifest) -> None:
    """Say what was recovered."""
    recovery = manifest.recovery
    assert recovery is not None
    report = recovery.report
    console.print(
        f"{output}: {manifest.achieved:.2%} of {len(manifest.modules)} modules' weights are zero "
        f"({manifest.method}, then {recovery.method})"
    )
    for at, step in enumerate(report.get("steps", []), 1):
        console.print(
            f"step {at}: sparsity {step['sparsity']:.4f}, ranks {min(step['ranks'])} to {max(step['ranks'])}, "
            f"loss {step['first_loss']:.3f} -> {step['last_loss']:.3f} over {step['tokens']:,} tokens"
        )
    if "tokens" in report:
        console.print(
            f"trained on {report['tokens']:,} tokens: loss {report['first_loss']:.3f} -> {report['last_loss']:.3f}"
        )
    if "effective_density" in report:
        console.print(f"effective density {report['effective_density']:.2%}, low-rank factors included")
    console.print(f"next: sparsedeploy eval {output} --data TEXT", soft_wrap=True)
