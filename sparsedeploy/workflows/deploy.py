"""The job ``deploy``: from a model to an artifact whose quality, size and speed were measured, in one command.

``OUTPUT/deploy.json`` holds what is known after each step, so the same command goes on where it was stopped, and
another target in the same folder takes the search over. Trials are ordinary checkpoints in ``OUTPUT/checkpoints``, of
which only the best so far is kept. They share the texts, the dense model's perplexity and the plans in
``OUTPUT/plans``; see :mod:`sparsedeploy.workflows.deploy_compare`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsedeploy import progress
from sparsedeploy.calibration.samples import default_length
from sparsedeploy.checkpoint.card import pruned_card, put_card
from sparsedeploy.checkpoint.evaluations import add_evaluations
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError, add_hint
from sparsedeploy.folders import locked, write_json, write_text
from sparsedeploy.models.computing import resolve_device
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import build_empty, load_config, load_model
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.quality.engine_perplexity import engine_perplexity
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.reporting.report import html_report
from sparsedeploy.runtimes.engine import find_deployment
from sparsedeploy.runtimes.environments import install, status
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.deploy_compare import compare_pairs, make_plans, pairs_of, plan_path, tried_perplexity
from sparsedeploy.workflows.deploy_plan import Step, Work, measured_speed
from sparsedeploy.workflows.deploy_report import Outcome, format_options, report_of, result_of
from sparsedeploy.workflows.deploy_request import STATE, Prepared, State, prepare, trial_of
from sparsedeploy.workflows.deploy_search import Space, Trial, chosen, nearest, next_trial
from sparsedeploy.workflows.options import DeployOptions, PruneOptions, RecoverRunOptions, RunOptions
from sparsedeploy.workflows.plan import resolve_allocation
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recover import recover_checkpoint


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
        with locked(output, prepared.read):
            return _run(prepared, command)
    except BaseException as error:
        if (output / STATE).exists() and not isinstance(error, UserError):
            add_hint(error, "What is done is kept: run the same command again to resume.")
        raise


def plan(prepared: Prepared) -> list[Step]:
    """The steps with rough times; those of an earlier run are marked."""
    options, state = prepared.options, State(prepared)
    model = build_empty(prepared.folder, load_config(prepared.folder), trust_remote_code=False)
    length = options.calibration.length or default_length(model.config)
    work = Work.of(model, options.calibration.sequences * length, options.windows * prepared.context)
    speed = measured_speed()
    space = _space(options, (state.dense or {}).get("perplexity", 0.0) * (1 + prepared.within))
    known = {method: [one["seconds"] for one in state.trials if one["method"] == method] for method in options.methods}
    rough = {m: sum(known[m]) / len(known[m]) if known[m] else work.trial_seconds(m, speed) for m in options.methods}
    steps = [
        Step("runtime", f"install {prepared.aim.name}", None, status(prepared.aim.name).state == "installed"),
        Step(
            "dense",
            f"dense perplexity on {prepared.held_out}, {options.windows} windows of {prepared.context} tokens",
            2.0 * (work.weights + work.others) * work.held_out / speed,
            state.dense is not None,
        ),
    ]
    middle, ladder = f"{space.middle:.0%}", ", ".join(f"{rate:.0%}" for rate in space.rates)
    if len(space.pairs) > 1:
        what = f"{', '.join(space.methods)} with {', '.join(space.spread)} at {middle}, from one calibration"
        seconds = work.comparison_seconds([method for method, _ in space.pairs], speed)
        steps.append(Step("compare", what, seconds, bool(state.compared)))
    slowest, rivals = max(rough.values()), space.firsts(space.pairs[0])
    if space.searching:
        what = f"the best method at {middle} with {', '.join(trial.allocation for trial in rivals)}"
        steps.append(Step("try", what, len(rivals) * slowest, len(state.trials) >= len(rivals)))
    over = [
        bool(state.trials) and next_trial(each, pairs_of(state.compared), state.results) is None
        for each in (replace(space, recovery=None), space)
    ]
    steps.append(Step("try", f"the best pair at up to {space.halvings} of {ladder}", space.halvings * slowest, over[0]))
    if options.recovery is not None and options.recovery.data is not None:
        tokens = options.recovery.data.samples * options.recovery.data.max_length
        what = f"{space.recovery} at the rates above, until one is outside of the bound: two of them"
        steps.append(Step("recover", what, 2 * (slowest + work.training_seconds(tokens, speed)), over[1]))
    for name in prepared.aim.formats:
        seconds = 2 * work.export_seconds()
        steps.append(Step("export", f"{name}, and its perplexity in the engine", seconds, name in state.formats))
    tokens, models = options.prompt_length + options.decode_tokens, len(prepared.aim.formats) + 1
    bench = work.bench_seconds(tokens, options.rounds + 2, models, speed)
    steps.append(Step("bench", f"{models} models, {options.rounds} rounds", bench))
    return steps


def _run(prepared: Prepared, command: str) -> dict[str, Any]:
    options, output, aim = prepared.options, prepared.output, prepared.aim
    state = State(prepared)
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
    with _step(f"4/5  export {best.rate:.0%} ({best.how})"):
        for name, how in aim.formats.items():
            known = state.formats.get(name)
            if known is None or (known["perplexity"] is not None and not (output / known["folder"]).is_dir()):
                state.formats[name] = _format(prepared, checkpoint, best, name, how)
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
        folders = [str(output / one["folder"]) for one in within.values()]
        measured = benchmark(folders, options.against(baseline)).to_json()
    outcome = Outcome(prepared, state, best, within, baseline, measured)
    result = result_of(outcome)
    report = report_of(outcome, result, command)
    write_json(output / f"report-{aim.name}.json", report)
    write_text(output / f"report-{aim.name}.html", html_report(report))
    state.result = result
    state.save()
    return result


def _search(prepared: Prepared, state: State, space: Space) -> Trial:
    assert state.dense is not None
    make_plans(prepared, space)
    if len(space.pairs) > 1 and not state.compared:
        state.compared = compare_pairs(prepared, space, state.dense["perplexity"])
        state.save()
        for row in state.compared:
            name = f"{row['method']}, {row['allocation']}, {row['rate']:.0%}"
            progress.note(f"     {name}, estimated: {_told(row, state.dense)}")
    while (trial := next_trial(space, pairs_of(state.compared), state.results)) is not None:
        started = time.perf_counter()
        found: float | None = None
        try:
            model = load_model(_pruned(prepared, trial), dtype=torch.float32, device=resolve_device("auto"))
            found, reason = tried_perplexity(model, prepared.windows)
        except UserError as error:  # a rate that an allocation cannot meet, or a training that diverges
            if not any(words in error.message for words in ("cannot be met", "the state after step")):
                raise
            reason = error.message
        row = {**asdict(trial), "perplexity": found, "reason": reason, "seconds": time.perf_counter() - started}
        state.trials.append(row)
        state.save()
        progress.note(f"     {trial.name}: {reason or _told(row, state.dense or {})}")
        _forget(prepared, chosen(space, pairs_of(state.compared), state.results))
    best = chosen(space, pairs_of(state.compared), state.results)
    if best is None:
        close = nearest(state.results)
        value = next(one for one in state.trials if trial_of(one) == close)
        raise UserError(
            f"no rate from {space.rates[0]:.0%} to {space.rates[-1]:.0%} stays within {prepared.options.within}; the "
            f"nearest is {close.rate:.0%} with {close.how}: {_told(value, state.dense)}",
            "Allow more (--within), or try lower rates: --rate 0.2.",
        )
    if best.rate == space.rates[-1]:
        progress.note("     the highest rate that was asked for is within the bound: a higher --rate may be, too")
    return best


def _pruned(prepared: Prepared, trial: Trial) -> Path:
    """The checkpoint of a trial, made where it is not there."""
    folder = prepared.output / "checkpoints" / trial.name
    if folder.is_dir():
        return folder
    if trial.recovery is not None:
        assert prepared.options.recovery is not None
        pruned = _pruned(prepared, replace(trial, recovery=None))
        recover_checkpoint(pruned, folder, prepared.options.recovery, RecoverRunOptions(dtype="float32", resume=True))
    else:
        path = plan_path(prepared, trial.allocation, trial.rate)
        how = (
            {"plan": SparsityPlan.load(path)}
            if path.exists()
            else {"sparsity": trial.rate, "allocation": trial.allocation}
        )
        asked = PruneOptions(method=trial.method, calibration=prepared.options.calibration, **how)
        prune(prepared.source, folder, asked, RunOptions(resume=True), drawn=lambda: prepared.drawn)
    return folder


def _forget(prepared: Prepared, best: Trial | None) -> None:
    """Remove the checkpoints of trials that will not be exported."""
    for folder in (prepared.output / "checkpoints").iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and (best is None or folder.name != best.name):
            shutil.rmtree(folder)


def _describe(prepared: Prepared, checkpoint: Path, state: State) -> None:
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


def _format(prepared: Prepared, checkpoint: Path, best: Trial, name: str, how: Mapping[str, str]) -> dict[str, Any]:
    """Export in one format and measure its perplexity in the engine; a format that fails is a row with its reason."""
    folder = prepared.output / "artifacts" / prepared.aim.name / f"sparse-{100 * best.rate:g}-{name}"
    row: dict[str, Any] = {"folder": folder.relative_to(prepared.output).as_posix(), "perplexity": None, "reason": None}
    try:
        export_checkpoint(checkpoint, prepared.aim.name, folder, format_options(prepared, how), overwrite=True)
        deployment = find_deployment(folder)
        row |= engine_perplexity(deployment, prepared.windows, cores=prepared.options.cores).to_dict()
    except UserError as error:
        row["reason"] = str(error)
        progress.note(f"     {name}: {error}")
    return row


def _baseline(prepared: Prepared) -> str:
    """The dense model as the benchmark takes it."""
    aim = prepared.aim
    if aim.baseline is None:
        return f"{aim.name}={prepared.folder}"
    folder = prepared.output / "artifacts" / aim.name / f"dense-{aim.baseline}"
    if not folder.is_dir():
        export_checkpoint(prepared.folder, aim.name, folder, dict(aim.formats[aim.baseline]))
    return str(folder)


def _quality(prepared: Prepared, folder: Path) -> dict[str, Any]:
    return evaluate(folder, prepared.judge, LoadOptions(dtype="float32"))


def _quality_of(state: State, checkpoint: Path) -> dict[str, Any] | None:
    """The result of a trial in the form of ``evaluate``; the dense model's tells the text."""
    found = next((v for trial, v in state.results.items() if trial.name == checkpoint.name), None)
    if found is None or state.dense is None:
        return None
    texts = {name: {**text, "perplexity": found} for name, text in state.dense["texts"].items()}
    return {**state.dense, "model_sha256": model_sha256(checkpoint), "perplexity": found, "texts": texts}


def _space(options: DeployOptions, limit: float) -> Space:
    allocations = _once(options.allocations)
    searching = [
        name for name in allocations if resolve_allocation(PruneOptions(sparsity=0.5, allocation=name)).searches
    ]
    recovery = options.recovery.method if options.recovery else None
    return Space(sorted(set(options.rates)), _once(options.methods), allocations, limit, searching, recovery)


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


@contextmanager
def _step(text: str) -> Iterator[None]:
    progress.note(text)
    yield


def _told(row: dict[str, Any], dense: dict[str, Any]) -> str:
    if row["perplexity"] is None:
        return str(row["reason"])
    return f"perplexity {row['perplexity']:.3f}, {100 * (row['perplexity'] / dense['perplexity'] - 1):+.1f} %"
