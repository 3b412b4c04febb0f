"""From the samples of a benchmark to its rows: one for each candidate in each setting, measured or not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparsedeploy.speed.bandwidth import Bandwidth
from sparsedeploy.speed.byte_limit import bytes_per_token, decode_limit
from sparsedeploy.speed.candidates import Candidate
from sparsedeploy.speed.intervals import Summary, summarize, variation

PHASES = ("prefill", "decode", "total")
MEASURED, FAILED, UNSUPPORTED = "measured", "failed", "unsupported"
FEW_ROUNDS = 5
# More than this, of the median, and the machine was too noisy to conclude.
NOISY = 0.1


@dataclass(frozen=True)
class Setting:
    """What a comparison holds fixed. ``batch`` is how many sequences run at once."""

    cores: int
    prompt_length: int
    batch: int

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"prompt {self.prompt_length}, {cores}, batch {self.batch}"


@dataclass(frozen=True)
class Sample:
    """One candidate's run in one round. ``turn`` is its place in the round's order, from 0; times are in seconds."""

    name: str
    setting: Setting
    round: int
    turn: int
    prefill_seconds: float
    decode_seconds: list[float]

    def seconds(self, phase: str) -> float:
        """Of the prompt, of one token (the median) or of the whole run."""
        if phase == "prefill":
            return self.prefill_seconds
        if phase == "decode":
            return statistics.median(self.decode_seconds)
        return self.prefill_seconds + sum(self.decode_seconds)


@dataclass(frozen=True)
class Phase:
    """Prefill, decode or the whole run of one row.

    Attributes:
        ms: for the whole prompt up to the choice of its first new token (the time to first token); for one token of
            every sequence, each round's median; for the whole run.
        tokens_per_second: prompt tokens; new tokens; new tokens of the whole run, the first one included.
        speedup: the baseline's time over its own, of the same round; None for the baseline or without one.
    """

    ms: Summary
    tokens_per_second: float
    speedup: Summary | None


@dataclass(frozen=True)
class Row:
    """One candidate in one setting.

    Attributes:
        status: ``measured``, ``failed`` or ``unsupported`` (the runtime does not do the setting).
        reason: why there are no figures, in one line.
        source_sha256: of the checkpoint that was exported.
        sparsity: zeros among the prunable weights, as a part.
        load_seconds: to start the runtime and load the model.
        peak_memory_bytes: the most that its process had held when it was done with the setting.
        decode_limit: the highest decode speedup that memory traffic alone would allow, see
            :mod:`~sparsedeploy.speed.byte_limit`.
        weight_bytes: that decoding a token must at least read.
        read_ms: what reading them once takes at the measured bandwidth.
    """

    name: str
    runtime: str
    folder: str
    sha256: str
    source_sha256: str
    dtype: str
    sparsity: float
    baseline: bool
    setting: Setting
    status: str
    reason: str | None
    prefill: Phase | None
    decode: Phase | None
    total: Phase | None
    artifact_bytes: int
    load_seconds: float | None
    peak_memory_bytes: int | None
    decode_limit: float
    weight_bytes: float
    read_ms: float

    def phase(self, name: str) -> Phase:
        """Prefill, decode or total of a measured row."""
        found: Phase = getattr(self, name)
        return found


@dataclass(frozen=True)
class Noise:
    """How steady the machine was in one setting.

    Attributes:
        variation: of the whole runs' times, the candidates' median of it (see :func:`~.intervals.variation`).
        drift: how far the later half of the rounds lies from the earlier one, as a part, likewise.
        too_noisy: either is above 10 %, so the setting's figures are not to be concluded from; None with fewer than 5
            rounds, which cannot tell.
    """

    setting: Setting
    variation: float
    drift: float
    too_noisy: bool | None


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate in a setting, besides its samples."""

    status: str
    reason: str | None = None
    load_seconds: float | None = None
    peak_memory_bytes: int | None = None


def make_row(
    candidate: Candidate,
    base: Candidate,
    setting: Setting,
    samples: Sequence[Sample],
    outcome: Outcome,
    bandwidth: Bandwidth,
) -> Row:
    """The row of a candidate; the samples of a failed one are not summed up.

    Args:
        samples: its own and the baseline's in this setting, and any others.
    """
    own = _of(samples, candidate, setting)
    theirs = _of(samples, base, setting)
    measured = outcome.status == MEASURED
    phases = {name: _phase(name, setting, own, theirs, candidate is base) if measured else None for name in PHASES}
    weight_bytes = bytes_per_token(candidate.artifact)
    return Row(
        name=candidate.name,
        runtime=candidate.runtime.name,
        folder=str(candidate.folder),
        sha256=candidate.sha256,
        source_sha256=candidate.artifact.source.sha256,
        dtype=candidate.artifact.dtype,
        sparsity=candidate.artifact.sparsity.fraction,
        baseline=candidate is base,
        setting=setting,
        status=outcome.status,
        reason=outcome.reason,
        **phases,
        artifact_bytes=candidate.bytes,
        load_seconds=outcome.load_seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        decode_limit=decode_limit(candidate.artifact, base.artifact),
        weight_bytes=weight_bytes,
        read_ms=1e3 * weight_bytes / (bandwidth.best * 1e9),
    )


def judge_noise(setting: Setting, samples: Sequence[Sample]) -> Noise | None:
    """How steady the times of one setting were; None without any."""
    by_name: dict[str, list[float]] = {}
    for sample in samples:
        if sample.setting == setting:
            by_name.setdefault(sample.name, []).append(sample.seconds("total"))
    if not by_name:
        return None
    spread = statistics.median(variation(values) for values in by_name.values())
    drift = statistics.median(_drift(values) for values in by_name.values())
    rounds = max(len(values) for values in by_name.values())
    too_noisy = None if rounds < FEW_ROUNDS else spread > NOISY or drift > NOISY
    return Noise(setting, spread, drift, too_noisy)


def _of(samples: Sequence[Sample], candidate: Candidate, setting: Setting) -> dict[int, Sample]:
    """By round."""
    return {one.round: one for one in samples if one.name == candidate.name and one.setting == setting}


def _phase(name: str, setting: Setting, own: dict[int, Sample], base: dict[int, Sample], is_base: bool) -> Phase:
    seconds = {at: sample.seconds(name) for at, sample in sorted(own.items())}
    ms = summarize([1e3 * value for value in seconds.values()])
    ratios = [base[at].seconds(name) / value for at, value in seconds.items() if at in base]
    decoded = len(next(iter(own.values())).decode_seconds)
    tokens = setting.batch * {"prefill": setting.prompt_length, "decode": 1, "total": decoded + 1}[name]
    return Phase(ms, 1e3 * tokens / ms.median, None if is_base or not ratios else summarize(ratios))


def _drift(values: Sequence[float]) -> float:
    half = len(values) // 2
    if half == 0:
        return 0.0
    return abs(statistics.median(values[-half:]) / statistics.median(values[:half]) - 1)
