"""``prune --engine llmcompressor``: our plan, pruned by llm-compressor elsewhere, written as our checkpoint."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from sparsedeploy.allocation import model_layers
from sparsedeploy.checkpoint.manifest import EngineRecord, Manifest
from sparsedeploy.checkpoint.recipe import recipe_yaml
from sparsedeploy.checkpoint.tensor_writer import TensorWriter
from sparsedeploy.checkpoint.writer import Provenance, complete
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_free_space, claim, new_folder, write_text
from sparsedeploy.masks import apply_mask
from sparsedeploy.models.stored_names import stored_slices
from sparsedeploy.plan import ModuleTarget, SparsityPlan
from sparsedeploy.processes import refuse_several
from sparsedeploy.pruning.sweep import check_block
from sparsedeploy.runtimes import llmcompressor
from sparsedeploy.workflows.options import PruneOptions, RunOptions, request_of
from sparsedeploy.workflows.plan import choose_plan, model_to_measure, prepare

ENGINE = "llmcompressor"


def prune_with_llmcompressor(
    source: str,
    output: Path,
    options: PruneOptions,
    run: RunOptions = RunOptions(),
    *,
    python: str | None = None,
) -> Manifest:
    """:func:`sparsedeploy.workflows.prune.prune` with llm-compressor as the pruner; returns the checkpoint's manifest.

    Unlike the built-in engine it holds the whole model in memory and cannot resume.

    Args:
        python: interpreter of an environment with llm-compressor; by default the managed one.

    Raises:
        UserError: a method that llm-compressor cannot replay, what only the built-in engine does, no environment, or
            what ``prune`` refuses.
    """
    for what, asked in (
        ("--reconstruct", options.reconstruct),
        ("--quantize", options.quantize),
        ("--lm-head", options.head),
        ("--resume", run.resume),
        ("--trust-remote-code", run.trust_remote_code),
    ):
        if asked:
            raise UserError(f"--engine {ENGINE} has no {what}", "Leave it out, or use --engine sparsedeploy.")
    refuse_several("--engine llmcompressor")
    with claim(output, overwrite=run.overwrite, inputs=(source, options.calibration.data)):
        return _prune(source, output, options, run, python)


def _prune(
    source: str,
    output: Path,
    options: PruneOptions,
    run: RunOptions,
    python: str | None,
) -> Manifest:
    llmcompressor.check_method(options.method)
    where = llmcompressor.environment(python)
    prepared = prepare(source, options, run, calibrates=True)
    assert prepared.calibration is not None
    layers = prepared.layers()
    if options.plan is not None:
        plan = options.plan
        plan.check_modules([shape for layer in model_layers(layers) for shape in layer])
    else:
        plan = choose_plan(model_to_measure(prepared, layers), prepared)
    method_options = asdict(prepared.pruner_options)
    if options.method == "sparsegpt":
        for target in plan.targets:
            check_block(target.pattern, method_options["block"])
    with tempfile.TemporaryDirectory(prefix="sparsedeploy-recipe-") as temporary:
        recipe = Path(temporary) / "recipe.yaml"
        write_text(recipe, recipe_yaml(plan, options.method, method_options))
        weights, facts = llmcompressor.prune_by_recipe(
            where,
            prepared.folder,
            recipe,
            plan,
            prepared.calibration.tokens,
            dtype=run.dtype,
            device=run.device,
        )
    engine = EngineRecord(ENGINE, facts["versions"], surplus_zeros(plan, weights))
    request = request_of(options, reads_text=True)
    provenance = Provenance(source, plan, options.method, method_options, prepared.described, request, engine=engine)
    with new_folder(output, overwrite=run.overwrite) as staging:
        check_free_space(staging, layers.files.size)
        slices = stored_slices(layers.model, layers.files)
        writer = TensorWriter(layers.files, staging, plan.targets, slices)
        writer.create()
        for target in plan.targets:
            weight = weights[target.name]
            mask = mask_from_zeros(weight, target)
            writer.put(target.name, apply_mask(weight, mask), mask)
        return complete(prepared.folder, staging, slices, provenance, {})


def mask_from_zeros(weight: torch.Tensor, target: ModuleTarget) -> torch.Tensor:
    """The mask of a pruned weight ``[rows, columns]``: True where kept, exactly ``target.zeros`` entries False.

    Of more zeros than planned (a block's share rounded up, or zeros that the dense weight had) the last ones count as
    kept; they are zero all the same.

    Raises:
        UserError: fewer zeros than planned, or groups that do not follow the pattern.
    """
    rows, columns = weight.shape
    if target.pattern is None:
        groups, wanted = (weight == 0).reshape(1, -1), target.zeros
    else:
        groups, wanted = (weight == 0).reshape(-1, target.pattern.m), target.pattern.m - target.pattern.n
    if int(groups.sum(dim=1).min()) < wanted:
        kind = f"does not follow {target.pattern}" if target.pattern else f"has {int(groups.sum())} zeros"
        raise UserError(
            f"llm-compressor left {target.name} short of the plan's {target.zeros} zeros (it {kind})",
            "Use the built-in engine, or more calibration sequences.",
        )
    pruned = groups & (groups.cumsum(dim=1) <= wanted)
    return ~pruned.reshape(rows, columns)


def surplus_zeros(plan: SparsityPlan, weights: dict[str, torch.Tensor]) -> int:
    """Zeros beyond the plan's, over all modules."""
    return sum(int((weights[target.name] == 0).sum()) - target.zeros for target in plan.targets)
