"""``sparsedeploy prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsedeploy.cli.common import (
    DataFieldOption,
    DenseModelArgument,
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
from sparsedeploy.cli.plan_options import (
    AccumulateOption,
    AllocationOption,
    AllocationOptionsOption,
    BatchSizeOption,
    DataOption,
    LengthOption,
    MethodOption,
    MethodOptionsOption,
    PatternOption,
    PatternOptionsOption,
    SamplesOption,
    SeedOption,
    SparsityOption,
)
from sparsedeploy.cli.recipe_flags import RecipeFlags
from sparsedeploy.cli.recover import (
    RecoverOptionsOption,
    TrainDataOption,
    TrainFieldOption,
    TrainLengthOption,
    TrainMinLengthOption,
    TrainOptionsOption,
    TrainSamplesOption,
    print_recovery,
    training_data,
)
from sparsedeploy.errors import UserError

if TYPE_CHECKING:
    from sparsedeploy.workflows.options import PruneOptions

OWN_ENGINE = "sparsedeploy"


def prune_command(
    context: typer.Context,
    model: DenseModelArgument,
    output: OutputOption,
    sparsity: SparsityOption = None,
    method: MethodOption = "wanda",
    allocation: AllocationOption = "uniform",
    pattern: PatternOption = "unstructured",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="What prunes: sparsedeploy, or llmcompressor (in its own environment; wanda or sparsegpt).",
        ),
    ] = OWN_ENGINE,
    plan: Annotated[Path | None, typer.Option("--plan", help="Use this plan file; no allocation is run.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A shipped recipe's name or a YAML file; flags override it.")
    ] = None,
    recover: Annotated[
        str | None, typer.Option("--recover", help="Win quality back: losa, sparse-lora, lora or sparselo.")
    ] = None,
    data: DataOption = "c4",
    data_field: DataFieldOption = "text",
    samples: SamplesOption = 128,
    calibration_length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    accumulate: AccumulateOption = "float32",
    method_option: MethodOptionsOption = None,
    allocation_option: AllocationOptionsOption = None,
    pattern_option: PatternOptionsOption = None,
    recover_option: RecoverOptionsOption = None,
    train_data: TrainDataOption = None,
    train_field: TrainFieldOption = "text",
    train_samples: TrainSamplesOption = 10_000,
    train_length: TrainLengthOption = 1024,
    train_min_length: TrainMinLengthOption = 8,
    train_option: TrainOptionsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model sparse: calibrate, allocate, prune, and write a Hugging Face folder with its plan and masks."""
    from sparsedeploy.calibration.text import CalibrationOptions
    from sparsedeploy.plan import SparsityPlan
    from sparsedeploy.workflows.options import PruneOptions
    from sparsedeploy.workflows.prune import prune
    from sparsedeploy.workflows.recipes import load_recipe

    flags = RecipeFlags(context, load_recipe(recipe) if recipe else None)
    if not flags.typed("sparsity") and not flags.typed("pattern"):  # a target that is typed replaces the recipe's whole
        sparsity = flags.value("sparsity", sparsity, "prune", "sparsity")
        pattern = flags.value("pattern", pattern, "prune", "pattern")
    seed = flags.value("seed", seed, "calibration", "seed")
    recover = flags.value("recover", recover, "recover", "method")
    options = PruneOptions(
        sparsity=sparsity,
        pattern=pattern,
        pattern_options=flags.options(pattern_option, "prune", "pattern_options", owner="pattern"),
        method=flags.value("method", method, "prune", "method"),
        method_options=flags.options(method_option, "prune", "method_options", owner="method"),
        allocation=flags.value("allocation", allocation, "prune", "allocation"),
        allocation_options=flags.options(allocation_option, "prune", "allocation_options", owner="allocation"),
        plan=SparsityPlan.load(plan) if plan else None,
        calibration=CalibrationOptions(
            data=flags.value("data", data, "calibration", "data"),
            field=flags.value("data_field", data_field, "calibration", "field"),
            sequences=flags.value("samples", samples, "calibration", "sequences"),
            length=flags.value("calibration_length", calibration_length, "calibration", "length"),
            seed=seed,
            batch_size=flags.value("batch_size", batch_size, "calibration", "batch_size"),
            accumulate=flags.value("accumulate", accumulate, "calibration", "accumulate"),
        ),
    )
    run: dict[str, Any] = {
        "device": device,
        "dtype": parse_dtype(dtype),
        "resume": resume,
        "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }
    if engine != OWN_ENGINE:
        manifest = _prune_elsewhere(engine, model, output, options, recover, **run)
    elif recover is None:
        manifest = prune(model, output, options, **run)
    else:
        from sparsedeploy.workflows.options import RecoverOptions
        from sparsedeploy.workflows.recover import prune_and_recover

        recover_options = RecoverOptions(
            method=recover,
            options=flags.options(recover_option, "recover", "options", owner="recover"),
            data=training_data(
                flags.value("train_data", train_data, "train", "data"),
                flags.value("train_field", train_field, "train", "field"),
                flags.value("train_samples", train_samples, "train", "samples"),
                flags.value("train_length", train_length, "train", "max_length"),
                flags.value("train_min_length", train_min_length, "train", "min_length"),
                seed,
            ),
            training=flags.options(train_option, "recover", "training", owner="recover"),
            seed=flags.value("seed", seed, "recover", "seed"),
        )
        manifest = prune_and_recover(model, output, options, recover_options, **run)
    if as_json:
        print_json({"output": str(output), **_summary(manifest)})
        return
    if recover is not None:
        print_recovery(output, manifest)
        return
    summary = _summary(manifest)
    console.print(
        f"{output}: {summary['achieved']:.2%} of {summary['modules']} modules' weights are zero "
        f"({summary['method']}, {summary['allocation']}, {summary['pattern']})"
    )
    console.print(f"next: sparsedeploy export {output} --target deepsparse -o ARTIFACT", soft_wrap=True)


def _prune_elsewhere(
    engine: str,
    model: str,
    output: Path,
    options: PruneOptions,
    recover: str | None,
    *,
    resume: bool,
    trust_remote_code: bool,
    **run: Any,
) -> dict[str, Any]:
    """Prune with llm-compressor; refuses another engine and what it cannot do."""
    from sparsedeploy.workflows.prune_by_llmcompressor import ENGINE, prune_with_llmcompressor

    if engine != ENGINE:
        raise UserError(f"unknown engine '{engine}'", f"Known: {OWN_ENGINE}, {ENGINE}.")
    if recover is not None:
        raise UserError("--recover does not go with --engine", f"Prune first, then: sparsedeploy recover {output}.")
    if resume:
        raise UserError("a run of --engine llmcompressor cannot be resumed", "Leave --resume out.")
    if trust_remote_code:
        raise UserError("--engine llmcompressor does not run a model's own code", f"Use --engine {OWN_ENGINE}.")
    return prune_with_llmcompressor(model, output, options, **run)


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "sparsity": manifest["plan"]["sparsity"],
        "achieved": manifest["achieved"],
        "modules": len(manifest["modules"]),
        "method": manifest["method"],
        "engine": manifest.get("engine", {}).get("name", OWN_ENGINE),
        "allocation": manifest["plan"]["allocation"],
        "pattern": manifest["plan"]["pattern"],
        "calibration": manifest["calibration"],
        "source": manifest["source"],
        "recovery": manifest.get("recovery"),
    }
