"""The whole pipeline on the embedded reference model: train once, prune, evaluate, export, run in DeepSparse, report.

It goes on where an earlier run in the same folder stopped: checkpoints and artifacts that fit the request are kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import check_sparsity
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TaskOptions, TextOptions
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.quality.samples import prompts_of, sample_generations
from sparsedeploy.reference import reference_model
from sparsedeploy.reporting.levels import module_rows
from sparsedeploy.reporting.report import FORMAT, html_report, layer_sparsity
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.runtimes.environments import install
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import DemoOptions, PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

TARGET = "deepsparse"
# The reference model's own text: calibration reads its training split, evaluation what it never saw.
_DATA = "stdlib"
_SPLIT = "test"
_WINDOWS = 64


def demo(output: Path, options: DemoOptions, *, command: str = "sparsedeploy demo") -> dict[str, Any]:
    """Run everything, write ``report.json`` and ``report.html`` into ``output`` and return the report.

    Args:
        command: what repeats the run, for the report.

    Raises:
        UserError: an output that is a file, or any step that fails.
    """
    for sparsity in options.sparsities:
        check_sparsity(sparsity)
    if len(set(options.sparsities)) != len(options.sparsities):
        raise UserError("a sparsity is given twice", "Give each once.")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file", "Name a folder.")
    measured_on = EvalOptions(
        text=TextOptions((_DATA,), split=_SPLIT, max_windows=_WINDOWS), tasks=TaskOptions(options.tasks)
    )
    progress.note("1/5  reference model")
    dense = reference_model(options.preset)
    progress.note(f"2/5  prune to {', '.join(f'{s:.0%}' for s in options.sparsities)} ({options.method})")
    checkpoints = {"dense": dense}
    for sparsity in options.sparsities:
        name = f"sparse-{100 * sparsity:g}"
        checkpoints[name] = _pruned(dense, output / "checkpoints" / name, sparsity, options)
    progress.note(f"3/5  perplexity on held-out text{' and tasks' if options.tasks else ''}")
    quality = {name: evaluate(folder, measured_on) for name, folder in checkpoints.items()}
    progress.note("4/5  export")
    artifacts = {name: _exported(folder, output / "artifacts" / name) for name, folder in checkpoints.items()}
    progress.note("5/5  speed in DeepSparse")
    install(TARGET, python=options.python)
    measured = benchmark(
        [folder for name, folder in artifacts.items() if name != "dense"],
        BenchmarkOptions(
            baseline=str(artifacts["dense"]),
            cores=() if options.cores is None else (options.cores,),
            prompt_lengths=(options.prompt_length,),
            decode_tokens=options.decode_tokens,
            rounds=options.rounds,
            profile=options.profile,
        ),
    )
    prompts = prompts_of(text_windows(_DATA, load_tokenizer(dense), 64, split=_SPLIT, limit=_WINDOWS))
    samples = {
        name: sample_generations(find_deployment(folder), load_tokenizer(dense), prompts, cores=options.cores)
        for name, folder in artifacts.items()
    }
    sparsity_of = dict(zip(list(checkpoints)[1:], options.sparsities, strict=True))
    steps = {
        name: _commands(dense, checkpoints[name], artifacts[name], sparsity_of.get(name), options)
        for name in checkpoints
    }
    report = {
        "format": FORMAT,
        "title": "sparsedeploy demo",
        "sparsedeploy": __version__,
        "command": command,
        "settings": {
            **asdict(options),
            "sparsities": list(options.sparsities),
            "tasks": list(options.tasks),
            "data": _DATA,
        },
        "models": [
            {
                **_model(name, checkpoints[name], artifacts[name]),
                "quality": quality[name],
                "samples": samples[name],
                "commands": steps[name],
            }
            for name in checkpoints
        ],
        "commands": [line for step in steps.values() for line in step.values()],
        "benchmark": measured.to_json(),
    }
    write_json(output / "report.json", report)
    write_text(output / "report.html", html_report(report))
    return report


def _pruned(dense: Path, folder: Path, sparsity: float, options: DemoOptions) -> Path:
    calibration = CalibrationOptions(data=_DATA, sequences=options.samples)
    if folder.is_dir() and _is_made_of(folder, dense, sparsity, options):
        progress.note(f"     {folder.name} is there already")
        return folder
    asked = PruneOptions(
        sparsity=sparsity, method=options.method, allocation=options.allocation, calibration=calibration
    )
    prune(str(dense), folder, asked, RunOptions(resume=True, overwrite=True))
    return folder


def _is_made_of(folder: Path, dense: Path, sparsity: float, options: DemoOptions) -> bool:
    try:
        manifest = load_manifest(folder)
    except UserError:
        return False
    plan, calibration = manifest.plan, manifest.calibration
    return (
        manifest.source.sha256 == model_sha256(dense)
        and manifest.sparsedeploy == __version__
        and (manifest.method, plan.allocation, plan.sparsity) == (options.method, options.allocation, sparsity)
        and (calibration is None or calibration.sequences == options.samples)
    )


def _exported(checkpoint: Path, folder: Path) -> Path:
    try:
        if load_artifact(folder).source.sha256 == model_sha256(checkpoint):
            progress.note(f"     {folder.name} is there already")
            return folder
    except UserError:
        pass
    progress.note(f"     {folder.name}")
    export_checkpoint(checkpoint, TARGET, folder, overwrite=True)
    return folder


def _model(name: str, checkpoint: Path, artifact: Path) -> dict[str, Any]:
    exported = load_artifact(artifact)
    manifest = None if name == "dense" else load_manifest(checkpoint)
    plan = manifest and manifest.plan.to_dict()
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "artifact": str(artifact),
        "sparsity": exported.sparsity.fraction,
        "artifact_bytes": sum(path.stat().st_size for path in artifact.iterdir()),
        "prunable_weights": exported.sparsity.weights,
        "nonzero_weights": exported.sparsity.weights - exported.sparsity.zeros,
        "allocation": plan and plan["allocation"],
        "layer_sparsity": plan and layer_sparsity(plan),
        "modules": manifest and module_rows(manifest),
    }


def _commands(
    dense: Path, checkpoint: Path, artifact: Path, sparsity: float | None, options: DemoOptions
) -> dict[str, str]:
    """Step -> the command that repeats it; the dense model (sparsity None) is not pruned."""
    steps = {
        "eval": _line(
            ["sparsedeploy", "eval", checkpoint, "--data", _DATA, "--split", _SPLIT, "--max-windows", _WINDOWS]
            + (["--tasks", ",".join(options.tasks)] if options.tasks else [])
        ),
        "export": _line(["sparsedeploy", "export", checkpoint, "--target", TARGET, "-o", artifact]),
    }
    if sparsity is None:
        return steps
    words = ["sparsedeploy", "prune", dense, "-o", checkpoint, "--sparsity", f"{sparsity:g}"]
    words += ["--method", options.method, "--allocation", options.allocation]
    if load_manifest(checkpoint).calibration is not None:
        words += ["--data", _DATA, "--samples", options.samples]
    return {"prune": _line(words), **steps}


def _line(words: Iterable[object]) -> str:
    return shlex.join(map(str, words))
