"""The job ``deploy``: from a model to an artifact whose quality, size and speed were measured, in one command.

``OUTPUT/deploy.json`` holds what is known after each step, so the same command goes on where it was stopped, and
another target in the same folder takes the search over. Trials are ordinary checkpoints in ``OUTPUT/checkpoints``, of
which only the best so far is kept.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.checkpoint.card import add_evaluations, pruned_card, put_card
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError, add_hint
from sparsedeploy.folders import locked, write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import build_empty, load_config, resolve_model
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import check_sparsity
from sparsedeploy.quality.engine_perplexity import engine_perplexity
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.quality.samples import prompts_of, sample_generations
from sparsedeploy.reading import read_object
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.reporting.levels import module_rows
from sparsedeploy.reporting.report import FORMAT, html_report, layer_sparsity
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.runtimes.environments import install, status
from sparsedeploy.speed.benchmark import BenchmarkResult, benchmark
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.version import __version__
from sparsedeploy.workflows.deploy_plan import Aim, Step, Work, choose_aim, measured_speed
from sparsedeploy.workflows.deploy_search import Space, Trial, chosen, nearest, next_trial
from sparsedeploy.workflows.options import DeployOptions, PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

STATE = "deploy.json"
_FORMAT = 1
_SPLIT = "test"
_NAMED = ("stdlib", "c4")
# The options that decide the search, and those of the benchmark.
_SEARCH = ("within", "rates", "methods", "allocations", "held_out", "windows", "context")
_MEASURING = ("prompt_length", "decode_tokens", "rounds", "cores")


@dataclass(frozen=True)
class Prepared:
    """A checked request.

    Attributes:
        held_out: the text that quality is judged on; ``context`` and ``windows`` its windows.
        within: the growth of perplexity that is allowed, as a part.
        request: what decides the search; the state file must agree with it.
        measuring: what decides the benchmark.
    """

    source: str
    folder: Path
    output: Path
    aim: Aim
    options: DeployOptions
    held_out: str
    context: int
    within: float
    request: dict[str, Any]
    measuring: dict[str, Any]


def deploy(
    source: str, output: Path, options: DeployOptions, *, command: str = "sparsedeploy deploy"
) -> dict[str, Any]:
    """Find the sparsest model within the bound, export and measure it; write a report and return the result.

    Args:
        command: what repeats the run, for the report and for messages.

    Raises:
        UserError: a request that cannot be used, a bound that nothing meets, or any step that fails.
    """
    prepared = prepare(source, output, options)
    try:
        with locked(output):
            return _run(prepared, command)
    except BaseException as error:
        if (output / STATE).exists() and not isinstance(error, UserError):
            add_hint(error, "What is done is kept: the same command goes on.")
        raise


def prepare(source: str, output: Path, options: DeployOptions) -> Prepared:
    """Check everything that can be checked before the work.

    Raises:
        UserError: see :func:`deploy`.
    """
    within = parse_bound(options.within)
    for rate in options.rates:
        check_sparsity(rate)
    for registry, names in ((PRUNERS, options.methods), (ALLOCATORS, options.allocations)):
        for name in names:
            registry.get(name)
    if not (options.rates and options.methods and options.allocations):
        raise UserError("there is nothing to try", "Give at least one rate, method and allocation.")
    data = options.calibration.data
    held_out = options.held_out or data
    if _is_file(held_out) and (options.held_out is None or _same(held_out, data)):
        raise UserError(
            f"the text {held_out} has no split of its own to judge quality on",
            "Name another text that calibration does not see: --held-out FILE.",
        )
    for text in (data, held_out):
        if _is_file(text) and not Path(text).expanduser().exists():
            raise UserError(f"no text at '{text}'", "Name a file, a folder, stdlib, c4 or datasets:NAME.")
    aim = choose_aim(options.target)
    folder = resolve_model(source)
    config = load_config(folder)
    context = options.context or min(512, default_length(config))
    request = {
        "model_sha256": model_sha256(folder),
        "sparsedeploy": __version__,
        "options": {name: _plain(getattr(options, name)) for name in _SEARCH},
        "calibration": _plain(options.calibration),
    }
    _check_output(output, request)
    measuring = {name: getattr(options, name) for name in _MEASURING}
    return Prepared(source, folder, output, aim, options, held_out, context, within, request, measuring)


def plan(prepared: Prepared) -> list[Step]:
    """The steps with rough times; those of an earlier run are marked."""
    options, state = prepared.options, _State(prepared)
    model = build_empty(prepared.folder, load_config(prepared.folder), trust_remote_code=False)
    length = options.calibration.length or default_length(model.config)
    work = Work.of(model, options.calibration.sequences * length, options.windows * prepared.context)
    speed = measured_speed()
    space = _space(options, 0.0)
    known = {method: [one["seconds"] for one in state.trials if one["method"] == method] for method in options.methods}
    rough = {m: sum(known[m]) / len(known[m]) if known[m] else work.trial_seconds(m, speed) for m in options.methods}
    steps = [
        Step("runtime", f"make sure that {prepared.aim.name} is installed", None),
        Step(
            "dense",
            f"dense perplexity on {prepared.held_out}, {options.windows} windows of {prepared.context} tokens",
            2.0 * (work.weights + work.others) * work.held_out / speed,
            state.dense is not None,
        ),
    ]
    firsts = [Trial(space.middle, method, space.allocations[0]) for method in space.methods]
    for trial in firsts:
        done = trial in state.results
        steps.append(Step("try", f"{trial.rate:.0%}, {trial.method}, {trial.allocation}", rough[trial.method], done))
    slowest = max(rough.values())
    for allocation in space.allocations[1:]:
        steps.append(Step("try", f"{space.middle:.0%}, the best method, {allocation}", slowest))
    halvings = space.most_trials - len(firsts) - len(space.allocations) + 1
    ladder = ", ".join(f"{rate:.0%}" for rate in space.rates)
    if halvings:
        steps.append(Step("try", f"the best pair at up to {halvings} more of {ladder}", halvings * slowest))
    for name in prepared.aim.formats:
        seconds = 2 * work.export_seconds()
        steps.append(Step("export", f"{name}, and its perplexity in the engine", seconds, name in state.formats))
    tokens, models = options.prompt_length + options.decode_tokens, len(prepared.aim.formats) + 1
    bench = work.bench_seconds(tokens, options.rounds + 2, models, speed)
    steps.append(Step("bench", f"{models} models, {options.rounds} rounds", bench))
    return steps


def parse_bound(text: str) -> float:
    """``5%`` or ``0.05`` as a part.

    Raises:
        UserError: not a number, or negative.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"the bound is '{text}'", "Give the growth of perplexity that is allowed, such as 5% or 0.05.")
    return value


def sentence(result: dict[str, Any]) -> str:
    """What came out, in one line."""
    speed, best = result["decode_speedup"], result["chosen"]
    unsure = "" if speed["low"] > 1 or speed["high"] < 1 else " (its 95 % interval includes 1)"
    return (
        f"{speed['median']:.2f}x decode over the dense model in {result['baseline']}{unsure}, perplexity "
        f"{100 * best['growth']:+.1f} % ({result['dense']['perplexity']:.2f} to {best['perplexity']:.2f} on "
        f"{result['held_out']}), {best['bytes'] / result['baseline_bytes']:.2f} of the size; "
        f"{'serve' if result['serves'] else 'run'} it with: {result['run']}"
    )


class _State:
    """What is known, in a file that is written anew after each step.

    Attributes:
        formats: of this target: name -> folder, perplexity in the engine, and why there is none.
        result: of this target; None until everything was measured as it is asked for now.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._path = prepared.output / STATE
        values = read_object(self._path, fix="Name a new folder.") if self._path.exists() else {}
        self._request, self._target, self._measuring = prepared.request, prepared.aim.name, prepared.measuring
        self.dense: dict[str, Any] | None = values.get("dense")
        self.trials: list[dict[str, Any]] = values.get("trials", [])
        self._targets: dict[str, dict[str, Any]] = values.get("targets", {})
        known = self._targets.get(self._target, {})
        self.formats: dict[str, dict[str, Any]] = known.get("formats", {})
        self.result: dict[str, Any] | None = known.get("result") if known.get("measuring") == self._measuring else None

    @property
    def results(self) -> dict[Trial, float]:
        """Trial -> its perplexity; infinity where there is none."""
        return {
            Trial(one["rate"], one["method"], one["allocation"]): math.inf
            if one["perplexity"] is None
            else one["perplexity"]
            for one in self.trials
        }

    def save(self) -> None:
        here = {"measuring": self._measuring, "formats": self.formats, "result": self.result}
        self._targets = {**self._targets, self._target: here}
        values = {"dense": self.dense, "trials": self.trials, "targets": self._targets}
        write_json(self._path, {"format": _FORMAT, "request": self._request, **values})


def _run(prepared: Prepared, command: str) -> dict[str, Any]:
    options, output, aim = prepared.options, prepared.output, prepared.aim
    state = _State(prepared)
    if state.result is not None and Path(state.result["chosen"]["artifact"]).is_dir():
        progress.note("everything is done already")
        return state.result
    state.save()
    with _step(f"1/5  runtime {aim.name}"):
        if status(aim.name).state != "installed":
            install(aim.name, python=options.python)
    with _step(f"2/5  the dense model on {prepared.held_out}"):
        if state.dense is None:
            state.dense = _quality(prepared, prepared.folder)
            state.save()
    limit = state.dense["perplexity"] * (1 + prepared.within)
    space = _space(options, limit)
    with _step(f"3/5  search for the highest rate with a perplexity of at most {limit:.3f}"):
        best = _search(prepared, state, space)
    checkpoint = _pruned(prepared, best)
    _describe(prepared, checkpoint, state)
    with _step(f"4/5  export {best.rate:.0%} ({best.method}, {best.allocation})"):
        windows = _windows(prepared)
        for name, how in aim.formats.items():
            known = state.formats.get(name)
            if known is None or (known["perplexity"] is not None and not (output / known["folder"]).is_dir()):
                state.formats[name] = _format(prepared, checkpoint, best, name, how, windows)
                state.save()
        baseline = _baseline(prepared)
    within = {name: one for name, one in state.formats.items() if one["perplexity"] and one["perplexity"] <= limit}
    if not within:
        told = ", ".join(f"{name} {_told(one, state.dense)}" for name, one in state.formats.items())
        raise UserError(
            f"no format of {aim.name} stays within {options.within} at {best.rate:.0%} ({told})",
            f"Allow more (--within), or lower rates: --rate {best.rate - 0.05:.2f}.",
        )
    with _step("5/5  speed"):
        measured = _bench(prepared, baseline, [output / one["folder"] for one in within.values()]).to_json()
    result = _result(prepared, state, best, within, baseline, measured)
    report = _report(prepared, state, best, within, baseline, measured, result, command)
    write_json(output / f"report-{aim.name}.json", report)
    write_text(output / f"report-{aim.name}.html", html_report(report))
    state.result = result
    state.save()
    return result


def _search(prepared: Prepared, state: _State, space: Space) -> Trial:
    while (trial := next_trial(space, state.results)) is not None:
        started = time.perf_counter()
        found: float | None = None
        reason = None
        try:
            found = _quality(prepared, _pruned(prepared, trial))["perplexity"]
        except UserError as error:  # a rate that an allocation cannot meet, or a model that diverged
            if "diverged" not in error.message and "cannot be met" not in error.message:
                raise
            reason = error.message
        row = {**asdict(trial), "perplexity": found, "reason": reason, "seconds": time.perf_counter() - started}
        state.trials.append(row)
        state.save()
        progress.note(f"     {trial.name}: {reason or _told(row, state.dense or {})}")
        _forget(prepared, chosen(space, state.results))
    best = chosen(space, state.results)
    if best is None:
        close = nearest(state.results)
        value = next(one for one in state.trials if Trial(one["rate"], one["method"], one["allocation"]) == close)
        raise UserError(
            f"no rate from {space.rates[0]:.0%} to {space.rates[-1]:.0%} stays within {prepared.options.within}; the "
            f"nearest is {close.rate:.0%} with {close.method}, {close.allocation}: {_told(value, state.dense or {})}",
            "Allow more (--within), or try lower rates: --rate 0.2.",
        )
    if best.rate == space.rates[-1]:
        progress.note("     the highest rate that was asked for is within the bound: a higher --rate may be, too")
    return best


def _pruned(prepared: Prepared, trial: Trial) -> Path:
    """The checkpoint of a trial, made where it is not there."""
    folder = prepared.output / "checkpoints" / trial.name
    if not folder.is_dir():
        asked = PruneOptions(
            sparsity=trial.rate,
            method=trial.method,
            allocation=trial.allocation,
            calibration=prepared.options.calibration,
        )
        prune(prepared.source, folder, asked, RunOptions(resume=True))
    return folder


def _forget(prepared: Prepared, best: Trial | None) -> None:
    """Remove the checkpoints of trials that will not be exported."""
    for folder in (prepared.output / "checkpoints").iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and (best is None or folder.name != best.name):
            shutil.rmtree(folder)


def _describe(prepared: Prepared, checkpoint: Path, state: _State) -> None:
    """Put the measured perplexities into the checkpoint's card."""
    manifest = load_manifest(checkpoint)
    sha256 = model_sha256(checkpoint)
    results = [state.dense, _quality_of(state, checkpoint) or _quality(prepared, checkpoint)]
    files = []
    for at, one in enumerate(results):
        path = prepared.output / f".quality-{at}.json"
        write_json(path, one)
        files.append(path)
    try:
        add_evaluations(checkpoint, files, sha256, manifest.source.sha256)
        put_card(checkpoint, pruned_card(checkpoint, manifest))
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _format(
    prepared: Prepared, checkpoint: Path, best: Trial, name: str, how: Mapping[str, str], windows: torch.Tensor
) -> dict[str, Any]:
    """Export in one format and measure its perplexity in the engine; a format that fails is a row with its reason."""
    folder = prepared.output / "artifacts" / prepared.aim.name / f"sparse-{100 * best.rate:g}-{name}"
    row: dict[str, Any] = {"folder": folder.relative_to(prepared.output).as_posix(), "perplexity": None, "reason": None}
    try:
        export_checkpoint(checkpoint, prepared.aim.name, folder, _how(prepared, how), overwrite=True)
        deployment = find_deployment(folder)
        row |= engine_perplexity(deployment, windows, cores=prepared.options.cores).to_dict()
    except UserError as error:
        row["reason"] = str(error)
        progress.note(f"     {name}: {error}")
    return row


def _how(prepared: Prepared, how: Mapping[str, str]) -> dict[str, str]:
    """The options of an export; the calibration text is named, as a method that reads none leaves no record of it."""
    text = prepared.options.calibration
    return {**how, **({"data": text.data, "field": text.field} if "int8" in how else {})}


def _baseline(prepared: Prepared) -> str:
    """The dense model as the benchmark takes it."""
    aim = prepared.aim
    if aim.baseline is None:
        return f"{aim.name}={prepared.folder}"
    folder = prepared.output / "artifacts" / aim.name / f"dense-{aim.baseline}"
    if not folder.is_dir():
        export_checkpoint(prepared.folder, aim.name, folder, dict(aim.formats[aim.baseline]))
    return str(folder)


def _bench(prepared: Prepared, baseline: str, folders: Iterable[Path]) -> BenchmarkResult:
    options = prepared.options
    asked = BenchmarkOptions(
        baseline=baseline,
        cores=() if options.cores is None else (options.cores,),
        prompt_lengths=(options.prompt_length,),
        decode_tokens=options.decode_tokens,
        rounds=options.rounds,
    )
    return benchmark(list(map(str, folders)), asked)


def _result(
    prepared: Prepared,
    state: _State,
    best: Trial,
    within: dict[str, dict[str, Any]],
    baseline: str,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """The fastest format that stays within the bound.

    Raises:
        UserError: the benchmark failed for the baseline or for every format.
    """
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
    run = f"sparsedeploy serve {shlex.quote(str(folder))}"
    if not prepared.aim.serves:
        run = f'sparsedeploy generate {shlex.quote(str(folder))} "Once upon a time"'
    return {
        "model": prepared.source,
        "target": prepared.aim.name,
        "within": prepared.within,
        "held_out": _short(prepared.held_out),
        "dense": {"perplexity": state.dense["perplexity"]},
        "baseline": prepared.aim.baseline or "its own type",
        "baseline_bytes": _folder_bytes(Path(baseline.rpartition("=")[2])),
        "chosen": {
            **asdict(best),
            "format": name,
            "artifact": str(folder),
            "checkpoint": str(prepared.output / "checkpoints" / best.name),
            "perplexity": within[name]["perplexity"],
            "growth": growth,
            "bytes": _folder_bytes(folder),
        },
        "decode_speedup": alive[name]["decode"]["speedup"],
        "prefill_speedup": alive[name]["prefill"]["speedup"],
        "trials": state.trials,
        "formats": state.formats,
        "report": str(prepared.output / f"report-{prepared.aim.name}.html"),
        "serves": prepared.aim.serves,
        "run": run,
    }


def _report(
    prepared: Prepared,
    state: _State,
    best: Trial,
    within: dict[str, dict[str, Any]],
    baseline: str,
    measured: dict[str, Any],
    result: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """See :mod:`sparsedeploy.reporting.report` for the form."""
    assert state.dense is not None
    checkpoint = prepared.output / "checkpoints" / best.name
    dense, steps = Path(baseline.rpartition("=")[2]), _commands(prepared, best, result)
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
    for name, one in within.items():
        folder = prepared.output / one["folder"]
        sparsity = load_artifact(folder).sparsity
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
                "quality": {**state.dense, **{key: one[key] for key in ("perplexity", "windows", "context")}},
                "checkpoint": str(checkpoint),
                "artifact": str(folder),
                "commands": {"prune": steps["prune"], "export": _export_line(prepared, checkpoint, folder, name)},
            }
        )
    prompts = prompts_of(_windows(prepared))
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
        "settings": settings,
        "bound": state.dense["perplexity"] * (1 + prepared.within),
        "trials": state.trials,
        "models": models,
        "commands": [steps[name] for name in ("prune", "eval dense", "eval")]
        + [model["commands"]["export"] for model in models[1:]],
        "benchmark": measured,
    }


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
    text, options = prepared.options.calibration, prepared.options
    words: list[object] = ["sparsedeploy", "prune", prepared.source, "-o", result["chosen"]["checkpoint"]]
    words += ["--sparsity", f"{best.rate:g}", "--method", best.method, "--allocation", best.allocation]
    if load_manifest(Path(result["chosen"]["checkpoint"])).calibration is not None:
        words += ["--data", text.data, "--samples", text.sequences, "--seed", text.seed]
        words += ["--calibration-length", text.length] if text.length else []
    judge: list[object] = ["--data", prepared.held_out, "--context", prepared.context]
    judge += ["--max-windows", options.windows, "--dtype", "float32"]
    return {
        "prune": _line(words),
        "eval": _line(["sparsedeploy", "eval", result["chosen"]["checkpoint"], *judge]),
        "eval dense": _line(["sparsedeploy", "eval", prepared.source, *judge]),
    }


def _export_line(prepared: Prepared, checkpoint: Path, folder: Path, name: str) -> str:
    words: list[object] = ["sparsedeploy", "export", checkpoint, "--target", prepared.aim.name, "-o", folder]
    for key, value in _how(prepared, prepared.aim.formats[name]).items():
        words += ["--target-option", f"{key}={value}"]
    return _line(words)


def _quality(prepared: Prepared, folder: Path) -> dict[str, Any]:
    field, limit = prepared.options.calibration.field, prepared.options.windows
    text = TextOptions((f"held-out={prepared.held_out}",), split=_SPLIT, field=field, max_windows=limit)
    return evaluate(folder, EvalOptions(text, context=prepared.context), LoadOptions(dtype="float32"))


def _quality_of(state: _State, checkpoint: Path) -> dict[str, Any] | None:
    """The result of a trial in the form of ``evaluate``; the dense model's tells the text."""
    found = next((v for trial, v in state.results.items() if trial.name == checkpoint.name), None)
    if found is None or state.dense is None:
        return None
    texts = {name: {**text, "perplexity": found} for name, text in state.dense["texts"].items()}
    return {**state.dense, "model_sha256": model_sha256(checkpoint), "perplexity": found, "texts": texts}


def _windows(prepared: Prepared) -> torch.Tensor:
    tokenizer = load_tokenizer(prepared.folder)
    field, limit = prepared.options.calibration.field, prepared.options.windows
    return text_windows(prepared.held_out, tokenizer, prepared.context, field=field, split=_SPLIT, limit=limit)


def _space(options: DeployOptions, limit: float) -> Space:
    return Space(sorted(set(options.rates)), _once(options.methods), _once(options.allocations), limit)


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _check_output(output: Path, request: dict[str, Any]) -> None:
    """Refuse a folder with other content, or with a deployment of another request."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output {output} is a file", "Name a folder.")
    path = output / STATE
    if not path.exists():
        if any(output.iterdir()):
            raise UserError(f"output {output} holds other files", "Name a new folder.")
        return
    known = read_object(path, fix="Name a new folder.").get("request")
    known = known if isinstance(known, dict) else {}
    if known != request:
        keys = [key for key in request if known.get(key) != request[key]]
        if keys == ["options"] and isinstance(known.get("options"), dict):
            keys = [k for k, value in request["options"].items() if known["options"].get(k) != value] or keys
        raise UserError(
            f"{output} holds a deployment that was asked for differently ({', '.join(keys)})",
            "Give the same options to go on with it, or name a new folder: -o FOLDER.",
        )


@contextmanager
def _step(text: str) -> Iterator[None]:
    progress.note(text)
    yield


def _told(row: dict[str, Any], dense: dict[str, Any]) -> str:
    if row["perplexity"] is None:
        return str(row["reason"])
    return f"perplexity {row['perplexity']:.3f}, {100 * (row['perplexity'] / dense['perplexity'] - 1):+.1f} %"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name


def _is_file(data: str) -> bool:
    return data not in _NAMED and not data.startswith("datasets:")


def _same(one: str, two: str) -> bool:
    return Path(one).exists() and Path(two).exists() and Path(one).resolve() == Path(two).resolve()


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value


def _line(words: Iterable[object]) -> str:
    return shlex.join(map(str, words))
