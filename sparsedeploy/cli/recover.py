"""``sparsedeploy recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsedeploy.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    ResumeOption,
    TrustOption,
    console,
    parse_dtype,
    print_json,
)

RecoverOptionsOption = Annotated[
    list[str] | None, typer.Option("--recover-option", help="NAME=VALUE for the recovery method, such as steps=5.")
]
TrainDataOption = Annotated[
    str | None,
    typer.Option("--train-data", help="Text to train on: a .jsonl of text or instruction rows, or what --data takes."),
]
TrainFieldOption = Annotated[str, typer.Option("--train-field", help="Text column of training rows and data sets.")]
TrainSamplesOption = Annotated[int, typer.Option("--train-samples", help="At most so many training sequences.")]
TrainLengthOption = Annotated[int, typer.Option("--train-length", help="Longest training sequence, in tokens.")]
TrainMinLengthOption = Annotated[int, typer.Option("--train-min-length", help="Shorter sequences are left out.")]
TrainOptionsOption = Annotated[
    list[str] | None, typer.Option("--train-option", help="NAME=VALUE of training, such as learning_rate=2e-4.")
]


def recover_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that sparsedeploy prune wrote.")],
    output: OutputOption,
    method: Annotated[str, typer.Option("--method", "-m", help="losa, sparse-lora, lora or sparselo.")] = "losa",
    train_data: TrainDataOption = None,
    train_field: TrainFieldOption = "text",
    train_samples: TrainSamplesOption = 10_000,
    train_length: TrainLengthOption = 1024,
    train_min_length: TrainMinLengthOption = 8,
    recover_option: RecoverOptionsOption = None,
    train_option: TrainOptionsOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of adapters, dropout and the order of the text.")] = 0,
    dense: Annotated[
        str | None, typer.Option("--dense", help="Where the dense model is now, for losa and sparselo.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Calibration text [default: that of the checkpoint].")
    ] = None,
    data_field: Annotated[str, typer.Option("--data-field", help="Text field of --data.")] = "text",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Sequences of --data.")] = 128,
    calibration_length: Annotated[
        int | None, typer.Option("--calibration-length", help="Tokens per sequence of --data.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Calibration sequences per layer call.")] = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Win a pruned model's quality back inside its mask, by training small adapters or keeping a low-rank part."""
    from sparsedeploy.calibration.text import CalibrationOptions
    from sparsedeploy.options import parse_pairs
    from sparsedeploy.workflows.options import RecoverOptions
    from sparsedeploy.workflows.recover import recover_checkpoint

    calibration = (
        CalibrationOptions(data, data_field, samples, calibration_length, 0, batch_size) if data is not None else None
    )
    manifest = recover_checkpoint(
        checkpoint,
        output,
        RecoverOptions(
            method=method,
            options=parse_pairs(recover_option or []),
            data=training_data(train_data, train_field, train_samples, train_length, train_min_length, seed),
            training=parse_pairs(train_option or []),
            seed=seed,
        ),
        dense=dense,
        calibration=calibration,
        device=device,
        dtype=parse_dtype(dtype),
        resume=resume,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({"output": str(output), "achieved": manifest["achieved"], "recovery": manifest["recovery"]})
    else:
        print_recovery(output, manifest)


def training_data(data: str | None, field: str, samples: int, length: int, min_length: int, seed: int) -> Any:
    """The training text's options; None when no text is given."""
    from sparsedeploy.recovery.data import DataOptions

    return None if data is None else DataOptions(data, field, samples, length, min_length, seed)


def print_recovery(output: Path, manifest: dict[str, Any]) -> None:
    """Say what was recovered."""
    recovery = manifest["recovery"]
    report = recovery["report"]
    console.print(
        f"{output}: {manifest['achieved']:.2%} of {len(manifest['modules'])} modules' weights are zero "
        f"({manifest['method']}, then {recovery['method']})"
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
