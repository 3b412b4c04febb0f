"""``sparsedeploy prune``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsedeploy.cli.common import (
    DenseModelArgument,
    JsonOption,
    OutputOption,
    console,
    print_json,
)
from sparsedeploy.cli.flags import Given, Section, takes
from sparsedeploy.cli.recover import print_recovery, take_recovery
from sparsedeploy.errors import UserError
from sparsedeploy.paths import check_apart
from sparsedeploy.workflows.options import (
    CalibrationOptions,
    DataOptions,
    PruneOptions,
    PruneRunOptions,
    RecoverOptions,
)

if TYPE_CHECKING:
    from sparsedeploy.checkpoint.manifest import Manifest

_OWN_ENGINE = PruneRunOptions.engine
_ROUNDING = ("quantize", "quantize_group")
_PLANNED = ("sparsity", "pattern", "pattern_options", "allocation", "allocation_options", "lm_head")


@takes(
    Section("prune", PruneOptions),
    Section("calibration", CalibrationOptions, "Calibration text"),
    Section("recover", RecoverOptions, "Recovery", undecided=("method",)),
    Section("train", DataOptions, "Recovery"),
    Section("run", PruneRunOptions),
)
def prune_command(
    model: DenseModelArgument,
    output: OutputOption,
    given: Given,
    as_json: JsonOption = False,
) -> None:
    """Make a model sparse: calibrate, allocate, prune, and write a Hugging Face folder with its plan and masks."""
    from sparsedeploy.workflows.prune import prune
    from sparsedeploy.workflows.prune_by_llmcompressor import prune_with_llmcompressor
    from sparsedeploy.workflows.recipes import load_recipe
    from sparsedeploy.workflows.recover import prune_and_recover

    run = given.build("run", PruneRunOptions)
    given = given.over(load_recipe(run.recipe).sections if run.recipe else {})
    check_apart(output, [path for path in (run.plan, run.recipe) if path])
    options, recovery = _take_options(given, run, model)
    if run.engine != _OWN_ENGINE and recovery is not None:
        raise UserError(
            "--recover cannot be combined with --engine", f"Prune first, then: sparsedeploy recover {output}."
        )
    if run.engine != _OWN_ENGINE:
        manifest = prune_with_llmcompressor(model, output, options, run)
    elif recovery is None:
        manifest = prune(model, output, options, run)
    else:
        manifest = prune_and_recover(model, output, options, recovery, run)
    if as_json:
        print_json({"output": str(output), **_summary(manifest)})
        return
    if recovery is not None:
        print_recovery(output, manifest)
        return
    rounded = f", int{manifest.quantization.bits}" if manifest.quantization else ""
    console.print(
        f"{output}: {manifest.achieved:.2%} of {len(manifest.modules)} modules' weights are zero "
        f"({manifest.method}, {manifest.plan.allocation}, {manifest.plan.pattern}{rounded})"
    )
    target = "llamacpp" if manifest.quantization else "deepsparse"
    console.print(f"next: sparsedeploy export {output} --target {target} -o ARTIFACT", soft_wrap=True)


def _values(given: Given, section: str) -> dict[str, Any]:
    """A section's values, without taking them."""
    return {name: given.value(section, name) for name in given.names(section)}


def _take_options(given: Given, run: PruneRunOptions, model: str) -> tuple[PruneOptions, RecoverOptions | None]:
    """What was asked for; every typed flag must count.

    Raises:
        UserError: naming a flag that has no effect.
    """
    from sparsedeploy.calibration.text import recorded_options
    from sparsedeploy.plan import SparsityPlan
    from sparsedeploy.workflows.plan import measures_text, resolve_allocation
    from sparsedeploy.workflows.prune import pruned_before

    ready = SparsityPlan.load(run.plan) if run.plan else None
    before = pruned_before(model, PruneOptions(**_values(given, "prune"), plan=ready))
    decided: Iterable[str] = _PLANNED if ready else ()
    why_not = "the plan decides it"
    if before is not None:
        decided = [name for name in given.names("prune") if name not in _ROUNDING]
        why_not = "the checkpoint's plan decides it"
    options = replace(given.build("prune", PruneOptions, without=decided), plan=ready)
    calibration = CalibrationOptions(**_values(given, "calibration"))
    if before is not None and before.calibration is not None and given.value("calibration", "data") is None:
        calibration = replace(recorded_options(before), **_values(given, "calibration"))
    recovery, calibrates, allocation = None, run.engine != _OWN_ENGINE, "uniform"
    why = {"prune": why_not, "recover": "there is no --recover", "train": "there is no --recover"}
    if given.value("recover", "method") is not None:
        recovery, method = take_recovery(given, calibration.seed)
        calibrates = calibrates or method.traits["calibrates"]
        allocation = method.traits.get("allocation", allocation)
        why |= {"recover": f"{method.name} does not train", "train": f"{method.name} does not train"}
    choice = None if ready or before else resolve_allocation(options, allocation)
    if (
        calibrates
        or measures_text(choice, options.method, reconstruct=options.reconstruct or options.grid is not None)
        or (choice is not None and choice.searches)
    ):
        given.take("calibration")
    spread = f" and {choice.name} read" if choice else " reads"
    given.refuse_unread({**why, "calibration": f"{options.method}{spread} no calibration text"})
    return replace(options, calibration=calibration), recovery


def _summary(manifest: Manifest) -> dict[str, Any]:
    values = manifest.to_json()
    return {
        "sparsity": manifest.plan.sparsity,
        "achieved": manifest.achieved,
        "modules": len(manifest.modules),
        "method": manifest.method,
        "engine": manifest.engine.name if manifest.engine else _OWN_ENGINE,
        "allocation": manifest.plan.allocation,
        "pattern": manifest.plan.pattern,
        "calibration": values["calibration"],
        "source": values["source"],
        "quantization": values.get("quantization"),
        "recovery": values.get("recovery"),
    }
