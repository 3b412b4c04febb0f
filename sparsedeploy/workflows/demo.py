"""The whole pipeline in one command: a model is pruned at several rates, evaluated, exported, run and reported.

It resumes where an earlier run in the same folder stopped: checkpoints, figures and artifacts that fit the request are
kept; only speed is measured anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.folders import locked, write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, resolve_model
from sparsedeploy.models.tensor_files import TensorFiles
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import check_sparsity
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TaskOptions, TextOptions
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.quality.samples import prompts_of, sample_generations
from sparsedeploy.reading import read_object
from sparsedeploy.reference import reference_model
from sparsedeploy.reporting.explain import NARROW, why
from sparsedeploy.reporting.levels import module_rows
from sparsedeploy.reporting.report import FORMAT, html_report
from sparsedeploy.reporting.summary import layer_sparsity
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.runtimes.environments import install, status
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.targets.options import ExportOptions
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.version import __version__
from sparsedeploy.workflows import demo_probe
from sparsedeploy.workflows.commands import command_line
from sparsedeploy.workflows.options import DemoOptions, PruneOptions, RunOptions
from sparsedeploy.workflows.packaged_models import PACKAGED, packaged_model
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.state_file import read_state, write_state

# DeepSparse is installed by the demo; llama.cpp is built from source, for longer than a demo may take.
_INSTALLED, _USED_IF_INSTALLED = "deepsparse", ("llamacpp",)
# Text that every Python has: calibration reads its training split, evaluation what it never saw.
_DATA = "stdlib"
_SPLIT = "test"
_LENGTH = 512
_SMALL_BYTES = 100_000_000  # of weight files
_PROBED = 0.7
_PROMPT = 64  # tokens of the texts that samples begin with


@dataclass(frozen=True)
class _Size:
    """What a model of a size gets: small ones are quick to measure well.

    Attributes:
        samples: calibration sequences of ``_LENGTH`` tokens.
        windows: of ``_LENGTH`` held-out tokens.
    """

    sparsities: tuple[float, ...]
    samples: int
    windows: int


_SMALL = _Size(sparsities=(0.5, 0.7, 0.9), samples=64, windows=64)
_REAL = _Size(sparsities=(0.5, 0.6, 0.7), samples=16, windows=32)


def demo(output: Path, options: DemoOptions, *, command: str = "sparsedeploy demo") -> dict[str, Any]:
    """Run everything, write ``report.json`` and ``report.html`` into ``output`` and return the report.

    Args:
        command: what repeats the run, for the report.

    Raises:
        UserError: an output that is a file, no engine that runs here, or any step that fails.
    """
    for sparsity in options.sparsities:
        check_sparsity(sparsity)
    if len(set(options.sparsities)) != len(options.sparsities):
        raise UserError("a sparsity is given twice", "Give each once.")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file", "Name a folder.")
    if options.model is not None and (options.train or options.preset != DemoOptions.preset):
        raise UserError("--model leaves no use for --train and --preset", "Leave one of them out.")
    with locked(output, [options.model] if options.model else []):
        return _demo(output, options, command)


def _demo(output: Path, options: DemoOptions, command: str) -> dict[str, Any]:
    tasks = TaskOptions(options.tasks)
    engines, skipped = _engines(options)
    progress.note("1/5  model")
    dense, about = _model_of(options)
    options, size = _settled(options, dense)
    progress.note(f"     {about}")
    progress.note(f"2/5  prune to {', '.join(f'{s:.0%}' for s in options.sparsities)} ({options.method})")
    checkpoints = {"dense": dense}
    for sparsity in options.sparsities:
        name = f"sparse-{100 * sparsity:g}"
        checkpoints[name] = _pruned(dense, output / "checkpoints" / name, sparsity, options)
    progress.note(f"3/5  perplexity on held-out text{' and tasks' if options.tasks else ''}")
    quality = {
        name: _quality(folder, output / "quality" / f"{name}.json", tasks, size) for name, folder in checkpoints.items()
    }
    progress.note(f"4/5  export for {' and '.join(engines)}")
    hidden = load_config(dense).get_text_config().hidden_size
    probes: dict[str, Path] = {}
    if options.probe and hidden < NARROW:
        left_out = demo_probe.why_not(output)
        skipped += [left_out] if left_out else []
        probes = {} if left_out else demo_probe.probe_checkpoints(output / "checkpoints", _PROBED)
    artifacts: dict[str, dict[str, Path]] = {}
    measured: dict[str, dict[str, Any]] = {}
    probed: dict[str, dict[str, Any]] = {}
    for engine in engines:
        try:
            artifacts[engine] = {
                name: _exported(folder, engine, output / "artifacts" / engine / name)
                for name, folder in {**checkpoints, **probes}.items()
            }
            progress.note(f"5/5  speed in {engine}")
            measured[engine] = _speed(artifacts[engine], list(checkpoints), hidden, options)
            if probes:
                probed[engine] = _speed(artifacts[engine], list(probes), demo_probe.SHAPE["hidden_size"], options)
        except UserError as error:  # what only one engine cannot leaves the others' figures
            if engine == engines[-1] and not measured:
                raise
            skipped.append(f"{engine} was left out: {error}")
            measured.pop(engine, None)
    engines = list(measured)
    probed = {engine: probed[engine] for engine in engines if engine in probed}
    samples = _samples(dense, artifacts[engines[0]], list(checkpoints), options)
    sparsity_of = dict(zip(list(checkpoints)[1:], options.sparsities, strict=True))
    first = artifacts[engines[0]]
    steps = {
        name: _commands(dense, checkpoints[name], first[name], sparsity_of.get(name), options, size)
        for name in checkpoints
    }
    report = {
        "format": FORMAT,
        "title": "sparsedeploy demo",
        "sparsedeploy": __version__,
        "command": command,
        "about": about,
        "settings": {
            **asdict(options),
            "sparsities": list(options.sparsities),
            "tasks": list(options.tasks),
            "data": _DATA,
        },
        "models": [
            {
                **_model(name, checkpoints[name], first[name]),
                "quality": quality[name],
                "samples": samples[name],
                "commands": steps[name],
            }
            for name in checkpoints
        ],
        "commands": [line for step in steps.values() for line in step.values()],
        "engines": [{"engine": engine, **measured[engine]} for engine in engines],
        "probe": {"title": demo_probe.TITLE, "engines": [{"engine": name, **probed[name]} for name in probed]},
        "skipped": skipped,
    }
    write_json(output / "report.json", report)
    write_text(output / "report.html", html_report(report))
    return report


def _engines(options: DemoOptions) -> tuple[list[str], list[str]]:
    """The engines to run in, installed where that is quick, and a sentence for each that is left out.

    Raises:
        UserError: none is left.
    """
    found, skipped = [], []
    for name in (_INSTALLED, *_USED_IF_INSTALLED):
        state = status(name)
        if not state.runnable:
            skipped.append(f"{state.title} was left out: {state.reason}.")
        elif name == _INSTALLED:
            if state.state != "installed":
                progress.note(f"     installing {state.title} into an environment of its own (once)")
            install(name, python=options.python)
            found.append(name)
        elif state.state == "installed":
            found.append(name)
        else:
            skipped.append(
                f"{state.title} was left out: it is {state.state}. It is built from source, once, with "
                f"sparsedeploy runtime install {name}; the next demo then uses it."
            )
    if not found:
        raise UserError(f"no engine of the demo runs here. {' '.join(skipped)}", "Use prune, eval and export --target.")
    return found, skipped


def _model_of(options: DemoOptions) -> tuple[Path, str]:
    """The dense model's folder and a line on what it is."""
    if options.model is None:
        folder = reference_model(options.preset, train=options.train)
        report = read_object(folder / "reference.json", fix="Reinstall sparsedeploy, or add --train.")
        millions, layers = report["result"]["parameters"] / 1e6, report["options"]["layers"]
        return folder, (
            f"the reference model: {millions:.1f} M weights, {layers} layers, trained on Python's standard library: "
            "a smoke test; see --model smollm2 for a pretrained one"
        )
    if options.model in PACKAGED and not Path(options.model).exists():
        return packaged_model(options.model), PACKAGED[options.model].about
    return resolve_model(options.model), options.model


def _settled(options: DemoOptions, dense: Path) -> tuple[DemoOptions, _Size]:
    """The options with what depends on the model's size filled in."""
    size = _SMALL if TensorFiles(dense).size < _SMALL_BYTES else _REAL
    settled = replace(
        options, sparsities=options.sparsities or size.sparsities, samples=options.samples or size.samples
    )
    return settled, size


def _prune_options(dense: Path, sparsity: float, options: DemoOptions) -> PruneOptions:
    assert options.samples is not None
    calibration = CalibrationOptions(data=_DATA, sequences=options.samples, length=_length(dense))
    return PruneOptions(
        sparsity=sparsity, method=options.method, allocation=options.allocation, calibration=calibration
    )


def _pruned(dense: Path, folder: Path, sparsity: float, options: DemoOptions) -> Path:
    if folder.is_dir() and _is_made_of(folder, dense, sparsity, options):
        progress.note(f"     {folder.name} exists already")
        return folder
    progress.note(f"     {folder.name}")
    prune(str(dense), folder, _prune_options(dense, sparsity, options), RunOptions(resume=True, overwrite=True))
    return folder


def _length(folder: Path) -> int:
    """Tokens of a window: ``_LENGTH``, or the model's positions where they are fewer."""
    return min(_LENGTH, getattr(load_config(folder).get_text_config(), "max_position_embeddings", None) or _LENGTH)


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
        and (calibration is None or (calibration.sequences, calibration.length) == (options.samples, _length(dense)))
    )


def _quality(folder: Path, path: Path, tasks: TaskOptions, size: _Size) -> dict[str, Any]:
    """Perplexity and scores of a checkpoint; the stored ones where they are of the same model and request."""
    request = {
        "model_sha256": model_sha256(folder),
        "windows": size.windows,
        "context": _length(folder),
        "tasks": list(tasks.names),
        "sparsedeploy": __version__,
    }
    if path.is_file():
        try:
            stored = read_state(path, fix="Remove it.")
        except UserError:
            stored = {}
        if stored.get("request") == request:
            return dict(stored["quality"])
    progress.note(f"     {path.stem}")
    found = evaluate(folder, _eval_options(folder, tasks, size))
    write_state(path, {"request": request, "quality": found})
    return found


def _eval_options(folder: Path, tasks: TaskOptions, size: _Size) -> EvalOptions:
    text = TextOptions((_DATA,), split=_SPLIT, max_windows=size.windows)
    return EvalOptions(text=text, tasks=tasks, context=_length(folder), batch_size=4)


def _exported(checkpoint: Path, target: str, folder: Path) -> Path:
    try:
        known = load_artifact(folder)
        if (known.source.sha256, known.sparsedeploy) == (model_sha256(checkpoint), __version__):
            progress.note(f"     {target}/{folder.name} exists already")
            return folder
    except UserError:
        pass
    progress.note(f"     {target}/{folder.name}")
    export_checkpoint(checkpoint, target, folder, overwrite=True)
    return folder


def _speed(artifacts: Mapping[str, Path], names: list[str], hidden: int, options: DemoOptions) -> dict[str, Any]:
    """The benchmark of these artifacts against the first, and a sentence for each."""
    measured = benchmark(
        [artifacts[name] for name in names[1:]],
        options.against(str(artifacts[names[0]]), profile=options.profile),
    ).to_json()
    return {"benchmark": measured, "why": {row["name"]: why(row, hidden) for row in measured["rows"]}}


def _samples(
    dense: Path, artifacts: Mapping[str, Path], names: list[str], options: DemoOptions
) -> dict[str, list[dict[str, Any]]]:
    """What each model writes after the same held-out prompts."""
    tokenizer = load_tokenizer(dense)
    prompts = prompts_of(text_windows(_DATA, tokenizer, _PROMPT, split=_SPLIT, limit=_SMALL.windows))
    return {
        name: sample_generations(find_deployment(artifacts[name]), tokenizer, prompts, cores=options.cores)
        for name in names
    }


def _model(name: str, checkpoint: Path, artifact: Path) -> dict[str, Any]:
    exported = load_artifact(artifact)
    manifest = None if name == "dense" else load_manifest(checkpoint)
    plan = manifest and manifest.plan.to_dict()
    return {
        "name": name,
        "checkpoint": str(checkpoint),
        "sparsity": exported.sparsity.fraction,
        "prunable_weights": exported.sparsity.weights,
        "nonzero_weights": exported.sparsity.weights - exported.sparsity.zeros,
        "allocation": plan and plan["allocation"],
        "layer_sparsity": plan and layer_sparsity(plan),
        "modules": manifest and module_rows(manifest),
    }


def _commands(
    dense: Path, checkpoint: Path, artifact: Path, sparsity: float | None, options: DemoOptions, size: _Size = _SMALL
) -> dict[str, str]:
    """Step -> the command that repeats it; the dense model (sparsity None) is not pruned."""
    export = ExportOptions(target=artifact.parent.name)
    steps = {
        "eval": command_line("eval", checkpoint, _eval_options(checkpoint, TaskOptions(options.tasks), size)),
        "export": command_line("export", checkpoint, export, output=artifact),
    }
    if sparsity is None:
        return steps
    asked = _prune_options(dense, sparsity, options)
    if load_manifest(checkpoint).calibration is None:
        asked = replace(asked, calibration=CalibrationOptions())
    return {"prune": command_line("prune", dense, asked, output=checkpoint), **steps}
