"""Two results of ``sparsedeploy bench``, an old and a new one: what became slower or larger, and is it sure.

Rows match by candidate, runtime and setting. A time is a regression when its median grew by more than the threshold and
the 95 % bootstrap interval of the ratio lies above 1 altogether. Sizes have no interval: the threshold alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.reading import read_object
from sparsedeploy.speed.benchmark import FORMAT
from sparsedeploy.speed.intervals import ratio_interval
from sparsedeploy.speed.rows import MEASURED, PHASES, Sample, Setting

SLOWER, FASTER, SAME, UNSURE, FAILS, MISSING = "worse", "better", "same", "unsure", "fails", "missing"
_SIZES = {"peak_memory_bytes": "peak memory", "artifact_bytes": "on disk"}
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


def load_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        UserError: no file, no JSON, or not a result of this format.
    """
    again = "Measure again with sparsedeploy bench -o FILE."
    values = read_object(Path(path), fix=again)
    if values.get("format") != FORMAT or "samples" not in values:
        raise UserError(f"{path} is not a benchmark result of format {FORMAT}", again)
    return values


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


def compare_results(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float) -> Comparison:
    """Compare two results, as plain data.

    Raises:
        UserError: no row is in both.
    """
    before, after = _by_key(old), _by_key(new)
    if not before.keys() & after.keys():
        raise UserError(
            "the two results have no row in common",
            "Measure the same artifacts in the same settings, under the same names.",
        )
    changes: list[Change] = []
    for key in [*before, *(key for key in after if key not in before)]:
        changes.extend(_changes(key, before.get(key), after.get(key), old, new, threshold))
    return Comparison(threshold, changes, _notes(old, new))


Key = tuple[str, str, Setting]


def _by_key(result: Mapping[str, Any]) -> dict[Key, Mapping[str, Any]]:
    return {(row["name"], row["runtime"], Setting(**row["setting"])): row for row in result["rows"]}


def _changes(
    key: Key,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    threshold: float,
) -> list[Change]:
    if before is None or after is None:
        return [Change(*key, "", None, None, None, None, None, MISSING)]
    if before["status"] != MEASURED:
        return []
    if after["status"] != MEASURED:
        return [Change(*key, "", None, None, None, None, None, FAILS)]
    changes = []
    for phase in PHASES:
        low, high = ratio_interval(_times(new, key, phase), _times(old, key, phase))
        medians = before[phase]["ms"]["median"], after[phase]["ms"]["median"]
        change = medians[1] / medians[0] - 1
        verdict = _verdict(change, low - 1, high - 1, threshold)
        changes.append(Change(*key, _NAMES[phase], *medians, change, low - 1, high - 1, verdict))
    for field, name in _SIZES.items():
        sizes = before[field], after[field]
        if all(sizes):
            change = sizes[1] / sizes[0] - 1
            changes.append(Change(*key, name, *sizes, change, None, None, _verdict(change, change, change, threshold)))
    return changes


def _verdict(change: float, low: float, high: float, threshold: float) -> str:
    if abs(change) <= threshold:
        return SAME
    if low <= 0 <= high:
        return UNSURE
    return SLOWER if change > 0 else FASTER


def _times(result: Mapping[str, Any], key: Key, phase: str) -> list[float]:
    """Seconds of every round."""
    samples = (
        Sample(**{**sample, "setting": Setting(**sample["setting"])})
        for sample in result["samples"]
        if sample["name"] == key[0] and sample["setting"] == asdict(key[2])
    )
    return [sample.seconds(phase) for sample in samples]


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    notes = []
    if old["machine"]["processor"] != new["machine"]["processor"]:
        notes.append(f"The processors differ: {old['machine']['processor']} before, {new['machine']['processor']} now.")
    if old["options"]["decode_tokens"] != new["options"]["decode_tokens"]:
        notes.append("The numbers of new tokens differ: end to end is not the same work.")
    for title, result in (("old", old), ("new", new)):
        if any(noise["too_noisy"] for noise in result["noise"]):
            notes.append(f"The {title} result was measured on a machine that was too noisy in some settings.")
    return notes
