"""Speed of models on their runtimes against one dense baseline, measured so that the ratio can be believed.

For each number of cores and each prompt length all candidates are loaded at once and interleaved: each round runs every
one of them, in an order that rotates. A round's speedup compares neighbours in time, and the figure given is the median
of the rounds' speedups with its bootstrap interval. Prefill and decode are measured apart, because sparsity helps them
differently. One that cannot be loaded, or fails in the middle, becomes a row with its reason; the others go on.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sparsedeploy import progress
from sparsedeploy.conversion import plain_options
from sparsedeploy.errors import UserError
from sparsedeploy.machine import Machine, this_machine
from sparsedeploy.runtimes.engine import (
    Deployment,
    LoadedModel,
    check_cores,
    check_dtype,
    check_lengths,
    chunk_for,
    load,
)
from sparsedeploy.runtimes.environments import require
from sparsedeploy.speed.bandwidth import Bandwidth, machine_bandwidth
from sparsedeploy.speed.candidates import Candidate, load_contenders
from sparsedeploy.speed.layer_profile import Profile, profile_deployment
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.speed.rows import (
    FAILED,
    FEW_ROUNDS,
    MEASURED,
    UNSUPPORTED,
    Noise,
    Outcome,
    Row,
    Sample,
    Setting,
    judge_noise,
    make_row,
)
from sparsedeploy.version import __version__

FORMAT = 2
_BUSY = 0.5
_DENSE = 0.01
# The threads of some runtimes go on spinning for a while after their last work; another one's turn waits for that.
_SETTLE_SECONDS = 0.2


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything that was measured and everything needed to measure it again.

    Attributes:
        artifacts: as given, ``FOLDER`` or ``RUNTIME=FOLDER``.
        options: as given, with the numbers of cores that were used.
        prompt_chunks: prompt length -> prompt tokens that a runtime with fixed shapes runs at once.
        machine: processor, flags, cores, governor and memory.
        load_average: the system's of the last minute at the start; None where there is none.
        busy_cores: cores that other processes used in the half second before the start.
        runtime: candidate -> what the runtime said about itself and how it loaded the model the first time.
        bandwidth: number of cores -> measured with so many threads.
        rows: by setting; in each the baseline first, then the artifacts in the order given.
        samples: every run that was counted, of failed candidates too.
        profiles: time by operator and layer, where asked for.
        notes: what to bear in mind when reading the figures.
    """

    artifacts: list[str]
    options: BenchmarkOptions
    prompt_chunks: dict[int, int]
    started: str
    machine: Machine
    load_average: float | None
    busy_cores: float
    versions: dict[str, str]
    runtime: dict[str, dict[str, Any]]
    bandwidth: dict[int, Bandwidth]
    rows: list[Row]
    noise: list[Noise]
    samples: list[Sample]
    profiles: list[Profile]
    notes: list[str]

    @property
    def failed(self) -> bool:
        """Whether the comparison itself failed: the baseline did somewhere, or no artifact was measured anywhere."""
        return any(row.status == FAILED for row in self.rows if row.baseline) or not any(
            row.status == MEASURED for row in self.rows if not row.baseline
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys of dictionaries are text."""
        values = {"format": FORMAT, **asdict(self), "failed": self.failed}
        values["bandwidth"] = {
            str(cores): {**asdict(one), "best": one.best} for cores, one in sorted(self.bandwidth.items())
        }
        values["options"] = {
            "artifacts": values.pop("artifacts"),
            **plain_options(self.options),
            "prompt_chunks": {str(length): chunk for length, chunk in values.pop("prompt_chunks").items()},
        }
        return values


def benchmark(artifacts: Sequence[str | Path], options: BenchmarkOptions) -> BenchmarkResult:
    """Measure prefill, decode and both together against a dense baseline, in every combination of the settings.

    Args:
        artifacts: folders to compare with the baseline, each ``FOLDER`` or ``RUNTIME=FOLDER``: exported ones, or plain
            checkpoints for a runtime that loads those.

    Raises:
        UserError: nothing was started, because the folders cannot be compared (see
            :func:`~sparsedeploy.speed.candidates.load_contenders`), the model cannot take the lengths, another
            option is out of range, or a runtime is not installed.
    """
    if not options.baseline:
        raise UserError("there is no baseline", "Name the dense model's folder: --baseline FOLDER.")
    candidates = load_contenders(artifacts, options.baseline, options.runtime)
    base = candidates[0]
    lengths = _each_once(options.prompt_lengths, "prompt length")
    for candidate in candidates:
        for length in lengths:
            check_lengths(candidate.artifact, length, options.decode_tokens)
    cores = _each_once(options.cores, "number of cores") if options.cores else [None]
    options = replace(
        options,
        cores=tuple(check_cores(one) for one in cores),
        prompt_lengths=tuple(lengths),
        batches=tuple(_check_batches(options.batches, candidates)),
    )
    chunks = {length: chunk_for(length, options.chunk) for length in lengths}
    deployments = {
        one.name: Deployment(one.folder, one.artifact, require(one.runtime.name, options.python)) for one in candidates
    }
    for one in candidates:
        check_dtype(options.computes_in, one.runtime)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    busy_cores = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)
    bandwidth = {}
    rows: list[Row] = []
    noise: list[Noise] = []
    samples: list[Sample] = []
    facts: dict[str, dict[str, Any]] = {}
    for count in options.cores:
        bandwidth[count] = machine_bandwidth(count)
        for length in lengths:
            for setting, outcomes in _measure(candidates, deployments, count, length, options, chunks, samples, facts):
                rows.extend(
                    make_row(one, base, setting, samples, outcomes[one.name], bandwidth[count]) for one in candidates
                )
                judged = judge_noise(setting, samples)
                noise.extend([judged] if judged is not None else [])
    profiles = _profiles(candidates, deployments, options, chunks) if options.profile else []
    return BenchmarkResult(
        artifacts=[str(one) for one in artifacts],
        options=options,
        prompt_chunks=chunks,
        started=started,
        machine=this_machine(),
        load_average=load_average,
        busy_cores=busy_cores,
        versions={"sparsedeploy": __version__, "python": platform.python_version(), "numpy": np.__version__},
        runtime=facts,
        bandwidth=bandwidth,
        rows=rows,
        noise=noise,
        samples=samples,
        profiles=profiles,
        notes=_notes(rows, noise, options, busy_cores),
    )


def _each_once(values: Sequence[int], what: str) -> list[int]:
    if not values:
        raise UserError(f"no {what} is given", "Give at least one.")
    if len(set(values)) != len(values):
        raise UserError(f"a {what} is given twice", "Give each once.")
    return sorted(values)


def _check_batches(batches: Sequence[int], candidates: Sequence[Candidate]) -> list[int]:
    """The batch sizes, smallest first.

    Raises:
        UserError: one above what any of the runtimes can.
    """
    asked = _each_once(batches, "batch size")
    most = max(one.runtime.max_batch for one in candidates)
    if asked[-1] > most:
        raise UserError(f"a batch of {asked[-1]} was asked for, these runtimes run 1 to {most}", "Use another --batch.")
    return asked


def _measure(
    candidates: Sequence[Candidate],
    deployments: dict[str, Deployment],
    cores: int,
    length: int,
    options: BenchmarkOptions,
    chunks: dict[int, int],
    samples: list[Sample],
    facts: dict[str, dict[str, Any]],
) -> Iterator[tuple[Setting, dict[str, Outcome]]]:
    """Load everyone, run each batch size, unload; adds to ``samples`` and ``facts``."""
    random = np.random.default_rng(options.seed)
    prompt = random.integers(0, candidates[0].artifact.shapes.vocab, length).tolist()
    failures: dict[str, str] = {}
    models: dict[str, LoadedModel] = {}
    load_seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for one in progress.track(candidates, f"load for {length} tokens on {cores} core{'s' if cores > 1 else ''}"):
            started = time.perf_counter()
            try:
                models[one.name] = stack.enter_context(
                    load(
                        deployments[one.name],
                        prompt_length=length,
                        new_tokens=options.decode_tokens,
                        cores=cores,
                        chunk=chunks[length],
                        batch=max([batch for batch in options.batches if batch <= one.runtime.max_batch], default=1),
                        dtype=options.computes_in,
                        timeout=options.timeout,
                    )
                )
            except Exception as error:  # whatever a runtime does, the others' results are kept
                failures[one.name] = _one_line(error)
                continue
            load_seconds[one.name] = time.perf_counter() - started
            facts.setdefault(one.name, models[one.name].facts)
        for batch in options.batches:
            setting = Setting(cores, length, batch)
            alive = [one for one in candidates if one.name not in failures and batch <= one.runtime.max_batch]
            failures.update(_interleave(alive, models, setting, prompt, options, samples))
            yield (
                setting,
                {
                    one.name: _outcome(one, batch, failures, models.get(one.name), load_seconds.get(one.name))
                    for one in candidates
                },
            )


def _interleave(
    candidates: Sequence[Candidate],
    models: dict[str, LoadedModel],
    setting: Setting,
    prompt: list[int],
    options: BenchmarkOptions,
    samples: list[Sample],
) -> dict[str, str]:
    """Run the rounds of one setting; returns who failed and why, and leaves those out of the rest."""
    failures: dict[str, str] = {}
    alive = list(candidates)
    total = options.warmup_rounds + options.rounds
    last_runtime = ""
    for number in progress.track(range(total), f"measure {setting}", total, unit=" rounds"):
        first = number % len(alive) if alive else 0
        for turn, one in enumerate(alive[first:] + alive[:first]):
            if one.runtime.name != last_runtime:
                time.sleep(_SETTLE_SECONDS)
            last_runtime = one.runtime.name
            try:
                timing = models[one.name].measure(prompt, options.decode_tokens, setting.batch)
            except Exception as error:  # as above
                failures[one.name] = _one_line(error)
                alive = [other for other in alive if other is not one]
                continue
            at = number - options.warmup_rounds
            if at >= 0:
                samples.append(Sample(one.name, setting, at, turn, timing.prefill_seconds, list(timing.decode_seconds)))
    return failures


def _outcome(
    one: Candidate, batch: int, failures: dict[str, str], model: LoadedModel | None, load_seconds: float | None
) -> Outcome:
    if batch > one.runtime.max_batch:
        most = "one sequence" if one.runtime.max_batch == 1 else f"{one.runtime.max_batch} sequences"
        return Outcome(UNSUPPORTED, f"{one.runtime.title} runs {most} at once", load_seconds)
    if one.name in failures:
        return Outcome(FAILED, failures[one.name], load_seconds)
    assert model is not None
    return Outcome(MEASURED, None, load_seconds, model.peak_memory())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _profiles(
    candidates: Sequence[Candidate],
    deployments: dict[str, Deployment],
    options: BenchmarkOptions,
    chunks: dict[int, int],
) -> list[Profile]:
    """At the first number of cores and prompt length."""
    cores, length = options.cores[0], options.prompt_lengths[0]
    asked = {
        "cores": cores,
        "prompt_length": length,
        "new_tokens": options.decode_tokens,
        "chunk": chunks[length],
        "seed": options.seed,
    }
    return [
        profile_deployment(one.name, deployments[one.name], phase, timeout=options.timeout, **asked)
        for one in progress.track(candidates, "time by operator")
        for phase in ("prefill", "decode")
    ]


def _notes(rows: Sequence[Row], noise: Sequence[Noise], options: BenchmarkOptions, busy_cores: float) -> list[str]:
    notes = []
    base = rows[0]
    if base.sparsity > _DENSE:
        notes.append(f"The baseline {base.name} is itself {base.sparsity:.0%} sparse.")
    if options.rounds < FEW_ROUNDS:
        notes.append(f"{options.rounds} rounds are too few to judge the spread; use --rounds {2 * FEW_ROUNDS}.")
    if busy_cores > _BUSY:
        notes.append(
            f"Other processes used {busy_cores:.1f} cores before the start; a quiet machine gives surer figures."
        )
    notes.extend(
        f"Too noisy to conclude at {one.setting}: the runs vary by {one.variation:.0%} and drift by {one.drift:.0%}."
        for one in noise
        if one.too_noisy
    )
    notes.extend(_missing(rows))
    for row in rows:
        if row.status != MEASURED or row.baseline:
            continue
        for phase, title in (("prefill", "Prefill"), ("decode", "Decode")):
            speedup = row.phase(phase).speedup
            if speedup is not None and speedup.includes_one:
                notes.append(
                    f"{title} of {row.name} at {row.setting}: no difference from the baseline is shown "
                    f"({speedup.low:.2f}x to {speedup.high:.2f}x)."
                )
    return notes


def _missing(rows: Sequence[Row]) -> list[str]:
    """One line for each candidate and reason, with the settings that it holds for."""
    settings: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            settings.setdefault((row.name, row.reason.rstrip(".")), []).append(str(row.setting))
    return [f"{name}: {reason} ({'; '.join(where)})." for (name, reason), where in settings.items()]
