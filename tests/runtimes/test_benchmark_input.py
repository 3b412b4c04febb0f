"""What ``bench`` refuses before it starts an engine, and how it sums up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.evaluation.bandwidth import measure_bandwidth
from sparsedeploy.evaluation.benchmark import benchmark, summarize
from tests.runtimes.artifacts import describe, write_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "home"))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "dense", describe())


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sparse", describe(zeros=500))


def test_runtime_that_is_not_installed(dense: Path, sparse: Path) -> None:
    with pytest.raises(UserError, match=r"not installed. Run: sparsedeploy runtime install deepsparse"):
        benchmark([sparse], dense, prompt_length=16, decode_tokens=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_length": 0}, "the prompt is empty"),
        ({"decode_tokens": 0}, "0 new tokens were asked for"),
        (
            {"prompt_length": 60, "decode_tokens": 5},
            "60 prompt tokens and 5 new ones are more than the model's 64 positions",
        ),
        ({"rounds": 0}, "0 rounds"),
        ({"warmup_rounds": -1}, "-1 to warm up"),
        ({"cores": 0}, "0 cores were asked for"),
        ({"cores": 1 + (os.cpu_count() or 1)}, "cores were asked for, this process may use"),
        ({"chunk": 6}, "the prompt chunk is 6"),
        ({"runtime": "abacus"}, "unknown runtime 'abacus'"),
    ],
)
def test_options_that_cannot_be_measured(dense: Path, sparse: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        benchmark([sparse], dense, **{"prompt_length": 16, "decode_tokens": 4, **options})


def test_nothing_to_compare(dense: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to compare with the baseline"):
        benchmark([], dense)
    with pytest.raises(UserError, match=r"given twice"):
        benchmark([dense], dense)
    with pytest.raises(UserError, match=r"given twice"):
        benchmark([sparse, tmp_path / "dense" / ".." / "sparse"], dense)
    with pytest.raises(UserError, match=r"is not an exported artifact"):
        benchmark([sparse], tmp_path / "missing")


@pytest.mark.parametrize("change", [{"weights": 2000}, {"vocab": 51}, {"hidden": 20}])
def test_other_shapes_are_refused(dense: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = write_folder(tmp_path / "other", describe(**change))
    with pytest.raises(UserError, match=r"models of different shapes"):
        benchmark([other], dense)


def test_other_target_is_refused(dense: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", describe(target="abacus"))
    with pytest.raises(UserError, match=r"no runtime here runs an artifact of target 'abacus'"):
        benchmark([dense], other, prompt_length=16, decode_tokens=4)
    with pytest.raises(UserError, match=r"was exported for abacus, runtime deepsparse runs deepsparse"):
        benchmark([dense], other, prompt_length=16, decode_tokens=4, runtime="deepsparse")


def test_changed_file_is_refused(dense: Path, sparse: Path) -> None:
    (sparse / "model.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match=r"model.onnx was changed since the export"):
        benchmark([sparse], dense)


def test_summary() -> None:
    summary = summarize([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (summary.median, summary.low, summary.high) == (3.0, 2.0, 4.0)
    assert (summary.minimum, summary.maximum) == (1.0, 5.0)
    assert summary.spread == pytest.approx(2 / 3)
    assert summarize([7.0]).spread == 0.0


def test_bandwidth_counts_what_it_says() -> None:
    measured = measure_bandwidth(2, array_bytes=1 << 20, repeats=3)
    assert (measured.threads, measured.array_bytes) == (2, 1 << 20)
    assert len(measured.read) == len(measured.copy) == 3
    assert measured.best == max(measured.read + measured.copy) > 0
