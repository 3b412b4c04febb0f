"""Results of measurements, edited by hand or damaged: one clear line, or what their samples say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Outcome
from tests.cli.mutations import mutations
from tests.cli.test_bad_input import refused
from tests.reporting.results import bench_result

Cli = Callable[..., Outcome]
OLD = bench_result()


def compared(cli: Cli, place: Path, content: bytes) -> Outcome:
    (place / "old.json").write_text(json.dumps(OLD))
    (place / "new.json").write_bytes(content)
    return cli("bench", "--compare", place / "old.json", place / "new.json", "--json", "-q")


@pytest.mark.parametrize("part", ["rows", "samples", "noise", "machine", "options", "format"])
def test_compared_results(cli: Cli, tmp_path: Path, part: str) -> None:
    """What is accepted gives finite figures for the rows that both have."""
    for content in mutations(json.dumps(OLD).encode(), 60, 31, lambda place: place[0] != part):
        outcome = compared(cli, tmp_path, content)
        if outcome.code == 2:
            refused(outcome, "", tmp_path)
            continue
        assert outcome.code in (0, 1), (outcome.err, content[:300])
        assert "unexpected" not in outcome.err, (outcome.err, content[:300])
        values = json.loads(outcome.out)  # NaN is refused where JSON is written
        assert values["changes"], content[:300]


def edited(path: tuple[str | int, ...], value: Any) -> bytes:
    new = copy.deepcopy(OLD)
    inner: Any = new
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(new).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("samples", 0, "prefill_seconds"), float("nan"), "samples entry 0: 'prefill_seconds' is not a finite number"),
        (("samples", 0, "prefill_seconds"), 0, "'prefill_seconds' is 0, not a time in seconds"),
        (("samples", 3, "decode_seconds"), [], "'decode_seconds' is empty"),
        (("samples", 3, "decode_seconds", 1), -1.0, "decode_seconds: '1' is -1, not a time"),
        (("samples", 3, "decode_seconds", 1), "fast", "decode_seconds: '1' is a string"),
        (("samples",), [], "rows entry 0 is measured and has no samples"),
        (("rows", 1), OLD["rows"][0], "has two rows of dense on deepsparse in one setting"),
        (("rows", 1, "status"), "ok", "'status' is 'ok'"),
        (("rows", 1, "setting", "cores"), 0, "'cores' is 0"),
        (("rows", 1, "setting"), None, "'setting' is null"),
        (("rows", 1, "artifact_bytes"), -5, "'artifact_bytes' is -5"),
        (("machine",), [], "'machine' is a list"),
    ],
)
def test_a_result_edited_by_hand(
    cli: Cli, tmp_path: Path, path: tuple[str | int, ...], value: Any, message: str
) -> None:
    refused(compared(cli, tmp_path, edited(path, value)), message, tmp_path)


def test_an_edited_median_does_not_count(cli: Cli, tmp_path: Path) -> None:
    """The samples are what was measured; a median beside them may say anything."""
    outcome = compared(cli, tmp_path, edited(("rows", 1, "decode", "ms", "median"), 0.001))
    assert outcome.code == 0, outcome.err
    assert {one["change"] for one in json.loads(outcome.out)["changes"]} == {0.0}


def test_different_baselines_are_told(cli: Cli, tmp_path: Path) -> None:
    assert "different models" not in compared(cli, tmp_path, json.dumps(OLD).encode()).out
    other = copy.deepcopy(OLD)
    for row in other["rows"]:
        row["source_sha256"] = "1" * 64
    assert "The baselines are different models" in compared(cli, tmp_path, json.dumps(other).encode()).out
