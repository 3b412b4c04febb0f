"""What ``bench`` refuses before it starts an engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.speed.bandwidth import measure_bandwidth
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.speed.candidates import load_contenders
from sparsedeploy.speed.options import BenchmarkOptions
from tests.runtimes.artifacts import describe, write_folder
from tests.small_models import save_model


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
        benchmark([sparse], BenchmarkOptions(baseline=str(dense), prompt_lengths=(16,), decode_tokens=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_lengths": (16, 0)}, "prompt_lengths is 0. It takes a whole number of at least 1"),
        ({"decode_tokens": 0}, "decode_tokens is 0"),
        (
            {"prompt_lengths": (8, 60), "decode_tokens": 5},
            "60 prompt tokens and 5 new ones are more than the model's 64 positions",
        ),
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup_rounds": -1}, "warmup_rounds is -1"),
        ({"cores": (0,)}, "cores is 0"),
        ({"cores": (1, 1 + (os.cpu_count() or 1))}, "cores were asked for, this process may use"),
        ({"cores": (1, 1)}, "a number of cores is given twice"),
        ({"prompt_lengths": (8, 8)}, "a prompt length is given twice"),
        ({"prompt_lengths": ()}, "no prompt length is given"),
        ({"batches": (1, 2)}, "a batch of 2 was asked for, these runtimes run 1 to 1"),
        ({"batches": (0,)}, "batches is 0"),
        ({"chunk": 6}, "the prompt chunk is 6"),
        ({"runtime": "abacus"}, "unknown runtime 'abacus'"),
    ],
)
def test_options_that_cannot_be_measured(dense: Path, sparse: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        benchmark(
            [sparse],
            BenchmarkOptions(**{"baseline": str(dense), "prompt_lengths": (16,), "decode_tokens": 4, **options}),
        )


def test_nothing_to_compare(dense: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to compare with the baseline"):
        benchmark([], BenchmarkOptions(baseline=str(dense)))
    with pytest.raises(UserError, match=r"given twice"):
        benchmark([dense], BenchmarkOptions(baseline=str(dense)))
    with pytest.raises(UserError, match=r"given twice"):
        benchmark([sparse, tmp_path / "dense" / ".." / "sparse"], BenchmarkOptions(baseline=str(dense)))
    with pytest.raises(UserError, match=r"is not an exported artifact"):
        benchmark([sparse], BenchmarkOptions(baseline=str(tmp_path / "missing")))


@pytest.mark.parametrize("change", [{"weights": 2000}, {"vocab": 51}, {"hidden": 20}])
def test_other_shapes_are_refused(dense: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = write_folder(tmp_path / "other", describe(**change))
    with pytest.raises(UserError, match=r"models of different shapes"):
        benchmark([other], BenchmarkOptions(baseline=str(dense)))


def test_other_target_is_refused(dense: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", describe(target="abacus"))
    with pytest.raises(UserError, match=r"no runtime here runs an artifact of target 'abacus'"):
        benchmark([dense], BenchmarkOptions(baseline=str(other), prompt_lengths=(16,), decode_tokens=4))
    with pytest.raises(UserError, match=r"was exported for abacus, runtime deepsparse runs deepsparse"):
        benchmark(
            [dense], BenchmarkOptions(baseline=str(other), prompt_lengths=(16,), decode_tokens=4, runtime="deepsparse")
        )


def test_each_folder_names_its_own_runtime(dense: Path, sparse: Path) -> None:
    found = load_contenders([f"deepsparse={sparse}"], dense, None)
    assert [(one.name, one.runtime.name, one.folder) for one in found] == [
        ("dense", "deepsparse", dense),
        ("sparse", "deepsparse", sparse),
    ]
    with pytest.raises(UserError, match=r"was exported for deepsparse, runtime torch runs checkpoint.*--target vllm"):
        load_contenders([f"torch={sparse}"], dense, None)
    with pytest.raises(UserError, match=r"given twice"):
        load_contenders([f"deepsparse={dense}"], dense, None)


def test_one_name_in_several_folders(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = write_folder(tmp_path / "other" / "dense", describe(zeros=500))
    names = [one.name for one in load_contenders([same], dense, None)]
    assert names == [f"{dense}@deepsparse", f"{same}@deepsparse"]


def test_plain_checkpoint_is_described_and_named_by_runtime(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    found = load_contenders([f"vllm={folder}"], folder, None)
    assert [(one.name, one.runtime.name) for one in found] == [("model@torch", "torch"), ("model@vllm", "vllm")]
    artifact = found[0].artifact
    assert artifact.target == "checkpoint"
    assert artifact.sparsity.weights == sum(
        linear.weight.numel() for linear in find_decoder_stack(load_model(folder)).all_linears().values()
    )
    assert artifact.sparsity.zeros == 0
    assert found[0].bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_changed_file_is_refused(dense: Path, sparse: Path) -> None:
    (sparse / "model.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match=r"model.onnx was changed since the export"):
        benchmark([sparse], BenchmarkOptions(baseline=str(dense)))


def test_bandwidth_counts_what_it_says() -> None:
    measured = measure_bandwidth(2, array_bytes=1 << 20, repeats=3)
    assert (measured.threads, measured.array_bytes) == (2, 1 << 20)
    assert len(measured.read) == len(measured.copy) == 3
    assert measured.best == max(measured.read + measured.copy) > 0
