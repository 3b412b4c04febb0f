"""Export for llm-compressor: recipe, calibration tokens, the dense model's place and a script that replays it all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sparsedeploy.artifacts.description import Artifact, Engine, Sparsity
from sparsedeploy.calibration.text import recorded_tokens
from sparsedeploy.checkpoint.manifest import RECIPE, Manifest, load_manifest
from sparsedeploy.checkpoint.recipe import recipe_yaml
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import file_sha256, model_sha256
from sparsedeploy.models.loading import resolve_model
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.weight_files import weight_files
from sparsedeploy.options import Options, option
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.registry import TARGETS
from sparsedeploy.resources import shipped
from sparsedeploy.runtimes import llmcompressor
from sparsedeploy.targets.base import ExportJob, describe

TOKENS = "calibration.safetensors"
DENSE = "dense_model.json"
SCRIPT = "replay.py"
PLAN = "plan.json"
_README = """\
# {name} for llm-compressor

`{recipe}` prunes the dense model below to this checkpoint's plan: {method}, {allocation}, {pattern},
{sparsity:.2%} of {weights:,} weights in {modules} modules.

    pip install llmcompressor=={version}
    python {script} --output PRUNED

The dense model is `{folder}` (hashes in `{dense}`); name another place with `--model`. In a program of your own:

    llmcompressor.oneshot(model=..., recipe="{recipe}", dataset=..., pipeline="sequential")

with the {sequences} sequences of {length} tokens in `{tokens}` (tensor `tokens`) one at a time and unshuffled. The
`sequential` pipeline runs all modifiers in one pass over the calibration text; the default, `independent`, makes one
for each and shows later modifiers a model that the earlier ones have pruned already.

`{plan}` has the zeros that each module should get. Wanda and N:M give them exactly. SparseGPT selects in blocks of
columns and rounds a block's share up: at most one zero more for each block.{more}
"""
_MORE = """

The recipe only prunes. What made this checkpoint besides, and the recipe does not do: {steps}."""


@dataclass(frozen=True)
class LlmcompressorOptions(Options):
    """Where the dense model and the calibration text are now."""

    model: str | None = option(
        None,
        "Folder or hub id of the dense model; None takes the one that the checkpoint's manifest names.",
        reads=True,
    )
    data: str | None = option(None, "Calibration text; None takes the one that the manifest names.", reads=True)
    field: str | None = option(
        None, "Its text column, for JSONL rows and data sets; None takes the one that the manifest names."
    )


@TARGETS.register("llmcompressor", LlmcompressorOptions)
def export_llmcompressor(job: ExportJob, options: LlmcompressorOptions) -> Artifact:
    """A folder that makes ``llmcompressor.oneshot`` prune the dense model as this checkpoint was.

    Raises:
        UserError: a folder without a plan, a pruner that llm-compressor cannot replay, another dense model or other
            calibration text than the checkpoint was made from.
    """
    opened = job.open(adapters=True)
    manifest = load_manifest(opened.folder)
    llmcompressor.check_method(manifest.method)
    plan = manifest.plan
    if plan.has_head:
        raise UserError(
            "llm-compressor prunes decoder layers, and this checkpoint's output head is pruned, too",
            "Export it for another target, or prune without --lm-head.",
        )
    dense = _dense_model(options.model or manifest.source.name, manifest.source.sha256)
    tokens = recorded_tokens(opened.tokenizer, opened.config, manifest, data=options.data, field=options.field)
    version = llmcompressor.pinned_version()
    with job.new_folder() as folder:
        write_text(folder / RECIPE, recipe_yaml(plan, manifest.method, manifest.options))
        plan.save(folder / PLAN)
        save_file({"tokens": tokens}, folder / TOKENS)
        write_json(folder / DENSE, _describe_dense(dense, manifest))
        shutil.copyfile(shipped("export") / llmcompressor.RUNTIME / SCRIPT, folder / SCRIPT)
        write_text(folder / "README.md", _readme(opened.folder, dense, manifest, plan, tokens.shape, version))
        stored = TensorFiles(dense).locate(f"{plan.targets[0].name}.weight")
        return describe(
            folder,
            opened,
            target="llmcompressor",
            dtype=str(stored.dtype).removeprefix("torch."),
            sparsity=Sparsity(
                sum(target.size for target in plan.targets), sum(target.zeros for target in plan.targets)
            ),
            engine=Engine(name="llmcompressor", version=version),
        )


def _dense_model(name: str, sha256: str | None) -> Path:
    """The dense model's folder, checked against the hash that the manifest has."""
    fix = "Name it: --target-option model=FOLDER."
    try:
        folder = resolve_model(name)
    except UserError as error:
        raise UserError(f"the dense model cannot be found: {error.message}", fix) from error
    if sha256 is not None and model_sha256(folder) != sha256:
        raise UserError(f"{folder} is not the dense model that the checkpoint was pruned from (its hash differs)", fix)
    return folder


def _describe_dense(folder: Path, manifest: Manifest) -> dict[str, Any]:
    files = [folder / "config.json", *weight_files(folder)]
    return {
        "name": manifest.source.name,
        "folder": str(folder.resolve()),
        "sha256": manifest.source.sha256,
        "files": {path.name: file_sha256(path) for path in files},
    }


def _readme(checkpoint: Path, dense: Path, manifest: Manifest, plan: SparsityPlan, shape: Any, version: str) -> str:
    steps = _besides(manifest)
    return _README.format(
        name=checkpoint.resolve().name,
        recipe=RECIPE,
        script=SCRIPT,
        dense=DENSE,
        tokens=TOKENS,
        plan=PLAN,
        method=manifest.method,
        allocation=plan.allocation,
        pattern=plan.pattern,
        sparsity=plan.achieved,
        weights=sum(target.size for target in plan.targets),
        modules=len(plan.targets),
        version=version,
        folder=dense.resolve(),
        sequences=shape[0],
        length=shape[1],
        more=_MORE.format(steps=", ".join(steps)) if steps else "",
    )


def _besides(manifest: Manifest) -> list[str]:
    """What was done to the weights that llm-compressor's recipe does not do."""
    steps = []
    if manifest.request.get("prune", {}).get("reconstruct"):
        steps.append("the kept weights of each layer were solved by least squares (--reconstruct)")
    if manifest.quantization is not None:
        steps.append(f"they were rounded (--quantize int{manifest.quantization.bits})")
    if manifest.recovery is not None:
        steps.append(f"the model was recovered ({manifest.recovery.method})")
    return steps
