"""The result of ``deploy``: one sentence, plain data, and the report with the command behind each figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.quality.samples import prompts_of, sample_generations
from sparsedeploy.reporting.levels import module_rows
from sparsedeploy.reporting.report import FORMAT
from sparsedeploy.reporting.summary import layer_sparsity
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.targets.options import ExportOptions
from sparsedeploy.version import __version__
from sparsedeploy.workflows.commands import command_line
from sparsedeploy.workflows.deploy_request import Prepared, State
from sparsedeploy.workflows.deploy_search import Trial
from sparsedeploy.workflows.options import PruneOptions


def sentence(result: dict[str, Any]) -> str:
    """What came out, in one line."""
    speed, best = result["decode_speedup"], result["chosen"]
    unsure = "" if speed["low"] > 1 or speed["high"] < 1 else " (its 95 % interval includes 1)"
    if result.get("noisy"):
        unsure = " (on a machine that was too noisy to conclude)"
    return (
        f"{speed['median']:.2f}x decode over the dense model in {result['baseline']}{unsure}, perplexity "
        f"{100 * best['growth']:+.1f} % ({result['dense']['perplexity']:.2f} to {best['perplexity']:.2f} on "
        f"{result['held_out']}), {best['bytes'] / result['baseline_bytes']:.2f} of the size; "
        f"{'serve' if result['serves'] else 'run'} it with: {result['run']}"
    )


@dataclass(frozen=True)
class Outcome:
    """What a deployment came to.

    Attributes:
        best: the trial that was exported.
        within: format -> its row, of those that stay within the bound.
        baseline: the dense model as the benchmark took it.
        measured: the benchmark's result as plain data.
    """

    prepared: Prepared
    state: State
    best: Trial
    within: dict[str, dict[str, Any]]
    baseline: str
    measured: dict[str, Any]


def result_of(outcome: Outcome) -> dict[str, Any]:
    """The fastest format that stays within the bound.

    Raises:
        UserError: the benchmark failed for the baseline or for every format.
    """
    prepared, state, within, measured = outcome.prepared, outcome.state, outcome.within, outcome.measured
    rows = {row["name"]: row for row in measured["rows"] if row["status"] == "measured"}
    base = next((row for row in measured["rows"] if row["baseline"]), None)
    alive = {name: rows[Path(one["folder"]).name] for name, one in within.items() if Path(one["folder"]).name in rows}
    if base is None or base["status"] != "measured" or not alive:
        reasons = "; ".join(str(row["reason"]) for row in measured["rows"] if row["status"] != "measured")
        raise UserError(f"the speed could not be measured ({reasons})", "Run the same command again.")
    name = max(alive, key=lambda each: alive[each]["decode"]["speedup"]["median"])
    folder = prepared.output / within[name]["folder"]
    assert state.dense is not None
    growth = within[name]["perplexity"] / state.dense["perplexity"] - 1
    run = command_line("serve", folder)
    if not prepared.aim.serves:
        run = f'{command_line("generate", folder)} "Once upon a time"'
    return {
        "model": prepared.source,
        "target": prepared.aim.name,
        "within": prepared.within,
        "held_out": _short(prepared.held_out),
        "dense": {"perplexity": state.dense["perplexity"]},
        "baseline": prepared.aim.baseline or "its own type",
        "baseline_bytes": _folder_bytes(Path(outcome.baseline.rpartition("=")[2])),
        "chosen": {
            **asdict(outcome.best),
            "format": name,
            "artifact": str(folder),
            "checkpoint": str(prepared.output / "checkpoints" / outcome.best.name),
            "perplexity": within[name]["perplexity"],
            "growth": growth,
            "bytes": _folder_bytes(folder),
        },
        "noisy": any(one["too_noisy"] for one in measured["noise"]),
        "decode_speedup": alive[name]["decode"]["speedup"],
        "prefill_speedup": alive[name]["prefill"]["speedup"],
        "compared": state.compared,
        "trials": state.trials,
        "formats": state.formats,
        "report": str(prepared.output / f"report-{prepared.aim.name}.html"),
        "serves": prepared.aim.serves,
        "run": run,
    }


def report_of(outcome: Outcome, result: dict[str, Any], command: str) -> dict[str, Any]:
    """See :mod:`sparsedeploy.reporting.report` for the form."""
    prepared, state, measured = outcome.prepared, outcome.state, outcome.measured
    assert state.dense is not None
    checkpoint = prepared.output / "checkpoints" / outcome.best.name
    dense, steps = Path(outcome.baseline.rpartition("=")[2]), _commands(prepared, outcome.best, result)
    manifest = load_manifest(checkpoint)
    plan_values = manifest.plan.to_dict()
    weights = sum(module["rows"] * module["columns"] for module in plan_values["modules"])
    models = [
        {
            "name": next(row["name"] for row in measured["rows"] if row["baseline"]),
            "sparsity": 0.0,
            "artifact_bytes": result["baseline_bytes"],
            "prunable_weights": weights,
            "nonzero_weights": weights,
            "allocation": None,
            "layer_sparsity": None,
            "quality": state.dense,
            "checkpoint": str(prepared.folder),
            "artifact": str(dense),
            "commands": {"eval": steps["eval dense"]},
        }
    ]
    made = {name: steps[name] for name in ("prune", "recover") if name in steps}
    for name, one in outcome.within.items():
        folder = prepared.output / one["folder"]
        artifact = load_artifact(folder)
        sparsity = artifact.sparsity
        models.append(
            {
                "name": folder.name,
                "sparsity": sparsity.fraction,
                "artifact_bytes": _folder_bytes(folder),
                "prunable_weights": sparsity.weights,
                "nonzero_weights": sparsity.weights - sparsity.zeros,
                "allocation": plan_values["allocation"],
                "layer_sparsity": layer_sparsity(plan_values),
                "modules": module_rows(manifest),
                "quality": _quality(state.dense, artifact.source.sha256, folder, one),
                "checkpoint": str(checkpoint),
                "artifact": str(folder),
                "commands": {**made, "export": _export_line(prepared, checkpoint, folder, name)},
            }
        )
    prompts = prompts_of(prepared.windows)
    for model in models:
        model["samples"] = _samples(prepared, Path(model["artifact"]), prompts)
    settings = {**prepared.request["options"], **prepared.request["calibration"], **prepared.measuring}
    settings |= {"target": prepared.aim.name, "held-out text": prepared.held_out}
    return {
        "format": FORMAT,
        "title": f"sparsedeploy deploy {_short(prepared.source)} for {prepared.aim.name}",
        "sparsedeploy": __version__,
        "command": command,
        "summary": sentence(result),
        "perplexity_in": f"torch for the dense model, in {prepared.aim.name} for the others",
        "settings": settings,
        "bound": state.dense["perplexity"] * (1 + prepared.within),
        "compared": state.compared,
        "trials": state.trials,
        "models": models,
        "commands": [*made.values(), *(steps[name] for name in ("eval dense", "eval"))]
        + [model["commands"]["export"] for model in models[1:]],
        "benchmark": measured,
    }


def _quality(dense: Mapping[str, Any], sha256: str, folder: Path, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of an artifact in its engine, beside what the dense model's result says of the text."""
    found = {name: measured[name] for name in ("perplexity", "cross_entropy", "windows", "context")}
    texts = {name: {**text, **found} for name, text in dense["texts"].items()}
    known = {name: dense[name] for name in ("data", "split", "tokens_sha256")}
    return {"model": str(folder), "model_sha256": sha256, **known, **found, "texts": texts}


def _samples(prepared: Prepared, folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What a model makes of some prompts; none where its runtime fails, as everything else is measured by then."""
    try:
        deployment = find_deployment(folder, prepared.aim.name)
        return sample_generations(deployment, load_tokenizer(prepared.folder), prompts, cores=prepared.options.cores)
    except UserError as error:
        progress.note(f"     no samples of {folder.name}: {error.message}")
        return []


def _commands(prepared: Prepared, best: Trial, result: dict[str, Any]) -> dict[str, str]:
    """Each step alone, as a command."""
    checkpoint = Path(result["chosen"]["checkpoint"])
    asked = PruneOptions(sparsity=best.rate, method=best.method, allocation=best.allocation)
    if load_manifest(checkpoint).calibration is not None:
        asked = replace(asked, calibration=prepared.options.calibration)
    alike = LoadOptions(dtype="float32")
    judge = [prepared.judge, alike]
    pruned = checkpoint.with_name(replace(best, recovery=None).name)
    steps = {
        "prune": command_line("prune", prepared.source, asked, output=pruned),
        "eval": command_line("eval", checkpoint, *judge),
        "eval dense": command_line("eval", prepared.source, *judge),
    }
    if best.recovery is not None:
        recovery = prepared.options.recovery
        assert recovery is not None
        assert recovery.data is not None
        recovery = replace(recovery, data=replace(recovery.data, seed=0))  # it is the recovery's
        steps["recover"] = command_line("recover", pruned, recovery, alike, output=checkpoint)
    return steps


def _export_line(prepared: Prepared, checkpoint: Path, folder: Path, name: str) -> str:
    asked = ExportOptions(target=prepared.aim.name, options=format_options(prepared, prepared.aim.formats[name]))
    return command_line("export", checkpoint, asked, output=folder)


def format_options(prepared: Prepared, how: Mapping[str, str]) -> dict[str, str]:
    """The options of an export; the calibration text is named, as a method that reads none leaves no record of it."""
    text = prepared.options.calibration
    return {**how, **({"data": text.data, "field": text.field} if "int8" in how else {})}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name
