"""Two results of ``sparsedeploy bench``, an old and a new one: what became slower or larger, and is it sure.

Rows match by candidate, runtime and setting. A time is a regression when its median grew by more than the threshold and
the 95 % bootstrap interval of the ratio lies above 1 altogether. Sizes have no interval: the threshold alone decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.reading import Fields, read_object
from sparsedeploy.speed.benchmark import FORMAT
from sparsedeploy.speed.intervals import ratio_interval
from sparsedeploy.speed.rows import FAILED, MEASURED, PHASES, UNSUPPORTED, Sample, Setting

SLOWER, FASTER, SAME, UNSURE, FAILS, MISSING = "worse", "better", "same", "unsure", "fails", "missing"
_SIZES = {"peak_memory_bytes": "peak memory", "artifact_bytes": "on disk"}
_AGAIN = "Measure again with sparsedeploy bench -o FILE."
Key = tuple[str, str, Setting]  # name, runtime, setting
_NAMES = {"prefill": "prefill", "decode": "decode", "total": "end to end"}


@dataclass(frozen=True)
class Change:
    """One figure of one row, old and new.

    Attributes:
        what: prefill, decode, end to end (ms), peak memory or on disk (bytes); empty for a whole row.
        change: new over old minus 1; None where one is not there.
        low, high: the 95 % interval of ``change``; None for sizes.
        verdict: ``worse`` (a regression), ``better``, ``same`` (within the threshold), ``unsure`` (beyond the
            threshold, but the interval holds "no change"), ``fails`` (measured before, failed now: a regression) or
            ``missing`` (only in one of the results).
    """

    name: str
    runtime: str
    setting: Setting
    what: str
    old: float | None
    new: float | None
    change: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All changes; ``notes`` say what makes the two results hard to compare."""

    threshold: float
    changes: list[Change]
    notes: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict in (SLOWER, FAILS)]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "regressed": bool(self.regressions)}


@dataclass(frozen=True)
class StoredRow:
    """What a comparison needs of a row.

    Attributes:
        sizes: in bytes by their field, as far as they were measured.
        source: hash of the checkpoint that was exported.
    """

    status: str
    baseline: bool
    sizes: dict[str, int]
    source: str


@dataclass(frozen=True)
class StoredResult:
    """A result that was read back: rows, the samples of each, and what they were measured on."""

    rows: dict[Key, StoredRow]
    samples: dict[tuple[str, Setting], list[Sample]]
    processor: str
    decode_tokens: int
    too_noisy: bool

    def times(self, key: Key, phase: str) -> list[float]:
        """Milliseconds of every round."""
        return [1e3 * sample.seconds(phase) for sample in self.samples[key[0], key[2]]]


def load_result(path: Path) -> StoredResult:
    """Read a result file.

    Raises:
        UserError: no file, no JSON, or see :func:`parse_result`.
    """
    return parse_result(read_object(Path(path), fix=_AGAIN), str(path))


def parse_result(values: Mapping[str, Any], where: str) -> StoredResult:
    """A result from plain data; ``where`` names the file in errors.

    Raises:
        UserError: another format, a key that is missing or of the wrong type, a time that is not positive, a row that
            is there twice, or one without samples.
    """
    fields = Fields(values, where, _AGAIN)
    if values.get("format") != FORMAT or "samples" not in values:
        raise UserError(f"{where} is not a benchmark result of format {FORMAT}", _AGAIN)
    samples: dict[tuple[str, Setting], list[Sample]] = {}
    for one in fields.each("samples"):
        sample = _sample(one)
        samples.setdefault((sample.name, sample.setting), []).append(sample)
    rows: dict[Key, StoredRow] = {}
    for one in fields.each("rows"):
        key = (one.text("name"), one.text("runtime"), _setting(one))
        if key in rows:
            raise UserError(f"{where} has two rows of {key[0]} on {key[1]} in one setting ({key[2]})", _AGAIN)
        row = _row(one)
        if row.status == MEASURED and (key[0], key[2]) not in samples:
            raise UserError(f"{one.where} is measured and has no samples", _AGAIN)
        rows[key] = row
    judged = {one.flag("too_noisy") for one in fields.each("noise") if one.values.get("too_noisy") is not None}
    processor = fields.fields("machine").text("processor")
    tokens = fields.fields("options").integer("decode_tokens", minimum=1)
    return StoredResult(rows, samples, processor, tokens, True in judged)


def _setting(fields: Fields) -> Setting:
    setting = fields.fields("setting")
    return Setting(**{name: setting.integer(name, minimum=1) for name in ("cores", "prompt_length", "batch")})


def _row(fields: Fields) -> StoredRow:
    status = fields.text("status")
    if status not in (MEASURED, FAILED, UNSUPPORTED):
        raise UserError(f"{fields.where}: 'status' is '{status[:40]}'", fields.fix)
    sizes = {name: fields.integer(name, minimum=1) for name in _SIZES if fields.values.get(name) is not None}
    return StoredRow(status, fields.flag("baseline"), sizes, fields.text("source_sha256"))


def _sample(fields: Fields) -> Sample:
    times = {str(at): value for at, value in enumerate(fields.items("decode_seconds"))}
    if not times:
        raise UserError(f"{fields.where}: 'decode_seconds' is empty", fields.fix)
    decode = Fields(times, f"{fields.where}: decode_seconds", fields.fix)
    return Sample(
        fields.text("name"),
        _setting(fields),
        fields.integer("round"),
        fields.integer("turn"),
        _seconds(fields, "prefill_seconds"),
        [_seconds(decode, at) for at in times],
    )


def _seconds(fields: Fields, key: str) -> float:
    """A time that a clock can measure: from a picosecond to a year."""
    value = fields.number(key)
    if not 1e-12 <= value <= 3.2e7:
        raise UserError(f"{fields.where}: '{key}' is {value:.6g}, not a time in seconds", fields.fix)
    return float(value)


def parse_part(name: str, text: str, fix: str) -> float:
    """``5%`` or ``0.05`` as a part; ``name`` says in messages what it is.

    Raises:
        UserError: not a number, or negative.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"the {name} is '{text}'", fix)
    return value


def parse_threshold(text: str) -> float:
    """``5%`` or ``0.05`` as a part.

    Raises:
        UserError: not a number, or negative.
    """
    return parse_part("threshold", text, "Give a fraction such as 5% or 0.05.")


def compare_results(old: StoredResult, new: StoredResult, threshold: float) -> Comparison:
    """Compare two results, from their samples.

    Raises:
        UserError: no row is in both.
    """
    if not old.rows.keys() & new.rows.keys():
        raise UserError(
            "the two results have no row in common",
            "Measure the same artifacts in the same settings, under the same names.",
        )
    changes: list[Change] = []
    for key in [*old.rows, *(key for key in new.rows if key not in old.rows)]:
        changes.extend(_changes(key, old, new, threshold))
    return Comparison(threshold, changes, _notes(old, new))


def _changes(key: Key, old: StoredResult, new: StoredResult, threshold: float) -> list[Change]:
    before, after = old.rows.get(key), new.rows.get(key)
    if before is None or after is None:
        return [Change(*key, "", None, None, None, None, None, MISSING)]
    if before.status != MEASURED:
        return []
    if after.status != MEASURED:
        return [Change(*key, "", None, None, None, None, None, FAILS)]
    changes = []
    for phase in PHASES:
        times = old.times(key, phase), new.times(key, phase)
        low, high = ratio_interval(times[1], times[0])
        medians = statistics.median(times[0]), statistics.median(times[1])
        change = medians[1] / medians[0] - 1
        verdict = _verdict(change, low - 1, high - 1, threshold)
        changes.append(Change(*key, _NAMES[phase], *medians, change, low - 1, high - 1, verdict))
    for field, name in _SIZES.items():
        if field in before.sizes and field in after.sizes:
            sizes = before.sizes[field], after.sizes[field]
            change = sizes[1] / sizes[0] - 1
            changes.append(Change(*key, name, *sizes, change, None, None, _verdict(change, change, change, threshold)))
    return changes


def _verdict(change: float, low: float, high: float, threshold: float) -> str:
    if abs(change) <= threshold:
        return SAME
    if low <= 0 <= high:
        return UNSURE
    return SLOWER if change > 0 else FASTER


def _notes(old: StoredResult, new: StoredResult) -> list[str]:
    notes = []
    if old.processor != new.processor:
        notes.append(f"The processors differ: {old.processor} before, {new.processor} now.")
    if old.decode_tokens != new.decode_tokens:
        notes.append("The numbers of new tokens differ: end to end is not the same work.")
    sources = [{row.source for row in result.rows.values() if row.baseline} for result in (old, new)]
    if sources[0] != sources[1]:
        notes.append("The baselines are different models.")
    for title, result in (("old", old), ("new", new)):
        if result.too_noisy:
            notes.append(f"The {title} result was measured on a machine that was too noisy in some settings.")
    return notes
