"""Speed of exported artifacts against a dense baseline on one runtime, measured so that the ratio can be believed.

All artifacts are loaded at once and take turns: each round runs every one of them, in an order that rotates. A round's
speedup compares neighbours in time, and the figure given is the median of the rounds' speedups. Prefill and decode are
measured apart, because sparsity helps them differently.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.evaluation.bandwidth import Bandwidth, measure_bandwidth
from sparsedeploy.evaluation.byte_limit import bytes_per_token, decode_limit
from sparsedeploy.export.artifact import ARTIFACT_FILE, Artifact, load_artifact
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.runtimes.engine import LoadedModel, check_cores, check_lengths, chunk_for, environment_for, open_model
from sparsedeploy.runtimes.machine import Machine, this_machine
from sparsedeploy.version import __version__

FORMAT = 1
_FEW_ROUNDS = 5
# The middle half of the rounds' speedups may be this wide, as a part of their median.
_WIDE_SPREAD = 0.15
_BUSY = 0.5
_DENSE = 0.01


@dataclass(frozen=True)
class BenchmarkOptions:
    """What was asked for: enough to run it again.

    Attributes:
        python: interpreter of an environment of the user's own; None for the managed one.
        prompt_chunk: prompt tokens that the runtime runs at once.
        warmup_rounds: rounds that are run and not counted.
        seed: of the random prompt tokens.
    """

    artifacts: list[str]
    baseline: str
    runtime: str
    python: str | None
    cores: int
    prompt_length: int
    prompt_chunk: int
    decode_tokens: int
    rounds: int
    warmup_rounds: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One artifact's run in one round. ``turn`` is its place in the round's order, from 0; times are in seconds."""

    artifact: str
    round: int
    turn: int
    prefill_seconds: float
    decode_seconds: list[float]


@dataclass(frozen=True)
class Summary:
    """Of the rounds' values: median, quartiles and extremes."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float

    @property
    def spread(self) -> float:
        """Width of the middle half as a part of the median."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Row:
    """One artifact's figures.

    Attributes:
        sha256: of its ``artifact.json``, which holds the hashes of all its files (they were verified).
        source_sha256: of the checkpoint that was exported.
        prefill_ms: for the whole prompt. ``decode_ms``: for one token, each round's median.
        prefill_speedup: baseline's time over its own, of the same round; None for the baseline. Decode likewise.
        decode_limit: the highest decode speedup that memory traffic alone would allow, see
            :mod:`~sparsedeploy.evaluation.byte_limit`.
        weight_bytes: that decoding a token must at least read.
        read_ms: what reading them once takes at the measured bandwidth.
    """

    name: str
    folder: str
    sha256: str
    source_sha256: str
    dtype: str
    sparsity: float
    baseline: bool
    prefill_ms: Summary
    decode_ms: Summary
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_speedup: Summary | None
    decode_speedup: Summary | None
    decode_limit: float
    weight_bytes: float
    read_ms: float


@dataclass(frozen=True)
class BenchmarkResult:
    """Everything that was measured and everything needed to measure it again.

    Attributes:
        machine: processor, flags, cores and memory; ``load_average`` is the system's of the last minute at the start.
        runtime: what the runtime said about itself and how it loaded each artifact.
        rows: the baseline first, then the artifacts in the order given.
        samples: every run that was counted.
        notes: what to bear in mind when reading the figures.
    """

    options: BenchmarkOptions
    started: str
    machine: Machine
    load_average: float | None
    versions: dict[str, str]
    runtime: dict[str, dict[str, Any]]
    bandwidth: Bandwidth
    rows: list[Row]
    samples: list[Sample]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": FORMAT, **asdict(self), "bandwidth": {**asdict(self.bandwidth), "best": self.bandwidth.best}}


@dataclass(frozen=True)
class _Entry:
    """An artifact in the comparison."""

    name: str
    folder: Path
    artifact: Artifact


def benchmark(
    artifacts: Sequence[Path],
    baseline: Path,
    *,
    runtime: str | None = None,
    python: str | None = None,
    cores: int | None = None,
    prompt_length: int = 64,
    decode_tokens: int = 32,
    rounds: int = 10,
    warmup_rounds: int = 2,
    chunk: int | None = None,
    seed: int = 0,
    timeout: float = 600.0,
) -> BenchmarkResult:
    """Measure prefill and decode of artifacts against a dense baseline on one runtime.

    Args:
        artifacts: exported folders to compare with the baseline.
        baseline: the exported folder of the dense model.
        runtime: by default the one that the artifacts were exported for.
        python: interpreter of an environment of the user's own that has the runtime.
        cores: threads to use; by default all that this process may use.
        chunk: prompt tokens that are run at once; by default the prompt's length, at most 64.
        timeout: seconds that one step of the runtime may take.

    Raises:
        UserError: artifacts that cannot be compared (other shapes or target), lengths that the model cannot take, the
            runtime is not installed or fails.
    """
    if rounds < 1 or warmup_rounds < 0:
        raise UserError(f"{rounds} rounds after {warmup_rounds} to warm up", "Give at least 1 and 0.")
    entries = _load_entries(artifacts, baseline)
    base = entries[0]
    for entry in entries:
        check_lengths(entry.artifact, prompt_length, decode_tokens)
    cores = check_cores(cores)
    chunk = chunk_for(prompt_length, chunk)
    environment = environment_for(base.artifact, base.folder, runtime, python)
    for entry in entries[1:]:
        environment_for(entry.artifact, entry.folder, environment.runtime.name, python)
    options = BenchmarkOptions(
        artifacts=[str(entry.folder) for entry in entries[1:]],
        baseline=str(base.folder),
        runtime=environment.runtime.name,
        python=python,
        cores=cores,
        prompt_length=prompt_length,
        prompt_chunk=chunk,
        decode_tokens=decode_tokens,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        seed=seed,
    )
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    progress.note(f"measure memory bandwidth with {cores} threads")
    bandwidth = measure_bandwidth(cores)
    with ExitStack() as stack:
        models = {}
        for entry in progress.track(entries, f"load on {environment.runtime.title}"):
            models[entry.name] = stack.enter_context(
                open_model(
                    entry.folder,
                    prompt_length=prompt_length,
                    new_tokens=decode_tokens,
                    runtime=environment.runtime.name,
                    python=python,
                    cores=cores,
                    chunk=chunk,
                    timeout=timeout,
                )
            )
        samples = _measure(models, options, base.artifact.shapes.vocab)
        facts = {name: model.facts for name, model in models.items()}
    rows = [_row(entry, base, samples, options, bandwidth) for entry in entries]
    return BenchmarkResult(
        options=options,
        started=started,
        machine=this_machine(),
        load_average=load_average,
        versions={"sparsedeploy": __version__, "python": platform.python_version(), "numpy": np.__version__},
        runtime=facts,
        bandwidth=bandwidth,
        rows=rows,
        samples=samples,
        notes=_notes(rows, options, load_average),
    )


def summarize(values: Sequence[float]) -> Summary:
    """Median, quartiles (inclusive method) and extremes of the rounds' values."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(statistics.median(values), low, high, min(values), max(values))


def _load_entries(artifacts: Sequence[Path], baseline: Path) -> list[_Entry]:
    """The baseline and the artifacts, verified, under names that tell them apart.

    Raises:
        UserError: nothing to compare, one given twice, or models of different shapes.
    """
    folders = [Path(baseline), *map(Path, artifacts)]
    if len(folders) == 1:
        raise UserError("there is nothing to compare with the baseline", "Name at least one other artifact.")
    resolved = [folder.resolve() for folder in folders]
    for at, folder in enumerate(folders):
        if resolved[at] in resolved[:at]:
            raise UserError(f"{folder} is given twice", "Name the baseline and each artifact once.")
    loaded = [
        (folder, load_artifact(folder, verify=True)) for folder in progress.track(folders, "verify the artifacts")
    ]
    base = loaded[0][1]
    for folder, artifact in loaded[1:]:
        if _shape(artifact) != _shape(base):
            raise UserError(
                f"{folder} and the baseline {folders[0]} are models of different shapes",
                "Compare exports of the same model, dense and pruned.",
            )
    names = [path.name for path in resolved]
    unique = len(set(names)) == len(names)
    return [
        _Entry(path.name if unique else str(folder), folder, artifact)
        for path, (folder, artifact) in zip(resolved, loaded, strict=True)
    ]


def _shape(artifact: Artifact) -> tuple[Any, ...]:
    return (artifact.model_type, artifact.shapes, artifact.sparsity.weights)


def _measure(models: dict[str, LoadedModel], options: BenchmarkOptions, vocabulary: int) -> list[Sample]:
    prompt = np.random.default_rng(options.seed).integers(0, vocabulary, options.prompt_length).tolist()
    names = list(models)
    samples = []
    total = options.warmup_rounds + options.rounds
    for number in progress.track(range(total), "measure", total, unit=" rounds"):
        first = number % len(names)
        for turn, name in enumerate(names[first:] + names[:first]):
            timing = models[name].measure(prompt, options.decode_tokens)
            if number >= options.warmup_rounds:
                at = number - options.warmup_rounds
                samples.append(Sample(name, at, turn, timing.prefill_seconds, timing.decode_seconds))
    return samples


def _row(
    entry: _Entry, base: _Entry, samples: Sequence[Sample], options: BenchmarkOptions, bandwidth: Bandwidth
) -> Row:
    prefill, decode = _by_round(entry, samples)
    base_prefill, base_decode = _by_round(base, samples)
    is_base = entry is base
    weight_bytes = bytes_per_token(entry.artifact)
    prefill_ms = summarize([1e3 * value for value in prefill])
    decode_ms = summarize([1e3 * value for value in decode])
    return Row(
        name=entry.name,
        folder=str(entry.folder),
        sha256=file_sha256(entry.folder / ARTIFACT_FILE),
        source_sha256=entry.artifact.source.sha256,
        dtype=entry.artifact.dtype,
        sparsity=entry.artifact.sparsity.fraction,
        baseline=is_base,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
        prefill_tokens_per_second=1e3 * options.prompt_length / prefill_ms.median,
        decode_tokens_per_second=1e3 / decode_ms.median,
        prefill_speedup=None if is_base else _ratios(base_prefill, prefill),
        decode_speedup=None if is_base else _ratios(base_decode, decode),
        decode_limit=decode_limit(entry.artifact, base.artifact),
        weight_bytes=weight_bytes,
        read_ms=1e3 * weight_bytes / (bandwidth.best * 1e9),
    )


def _by_round(entry: _Entry, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Seconds of the prompt and, as the round's median, of a token, in the order of the rounds."""
    own = sorted((sample for sample in samples if sample.artifact == entry.name), key=lambda sample: sample.round)
    return (
        [sample.prefill_seconds for sample in own],
        [statistics.median(sample.decode_seconds) for sample in own],
    )


def _ratios(base: Sequence[float], own: Sequence[float]) -> Summary:
    return summarize([slow / fast for slow, fast in zip(base, own, strict=True)])


def _notes(rows: Sequence[Row], options: BenchmarkOptions, load_average: float | None) -> list[str]:
    notes = []
    base = rows[0]
    if base.sparsity > _DENSE:
        notes.append(f"The baseline {base.name} is itself {base.sparsity:.0%} sparse.")
    if options.rounds < _FEW_ROUNDS:
        notes.append(f"{options.rounds} rounds are too few to judge the spread; use --rounds {2 * _FEW_ROUNDS}.")
    if load_average is not None and load_average > _BUSY:
        notes.append(
            f"The system was busy before the start (load average {load_average:.1f}); "
            "a quiet machine gives surer figures."
        )
    for row in rows[1:]:
        for phase, speedup in (("Prefill", row.prefill_speedup), ("Decode", row.decode_speedup)):
            assert speedup is not None
            middle = f"{speedup.low:.2f}x to {speedup.high:.2f}x in the middle half of the rounds"
            if speedup.low <= 1 <= speedup.high:
                notes.append(f"{phase} of {row.name}: no difference from the baseline is shown ({middle}).")
            elif speedup.spread > _WIDE_SPREAD:
                notes.append(f"{phase} of {row.name}: the spread is too large to conclude how much ({middle}).")
    return notes
