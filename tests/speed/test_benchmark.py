"""A benchmark on real engines: what it records, not how fast it was."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from sparsedeploy.artifacts.description import load_artifact
from sparsedeploy.reporting.benchmark_page import benchmark_page
from sparsedeploy.runtimes.engine import Timing, WorkerModel
from sparsedeploy.speed.benchmark import benchmark
from sparsedeploy.speed.byte_limit import decode_limit
from sparsedeploy.speed.options import BenchmarkOptions
from sparsedeploy.speed.rows import Setting
from tests.runtimes.exported import export_small

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("deepsparse_runtime")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bench")
    return [export_small(root / str(sparsity), "llama", sparsity).folder for sparsity in (0.0, 0.5, 0.8)]


@pytest.mark.slow
def test_result_holds_every_sample_and_follows_from_them(folders: list[Path]) -> None:
    dense, half, most = folders
    result = benchmark(
        [half, most],
        BenchmarkOptions(
            baseline=str(dense),
            cores=(1,),
            prompt_lengths=(10,),
            decode_tokens=3,
            rounds=3,
            warmup_rounds=1,
            chunk=4,
        ),
    )
    names = ["llama-0", "llama-50", "llama-80"]
    assert [row.name for row in result.rows] == names
    assert [row.baseline for row in result.rows] == [True, False, False]
    assert [row.sparsity for row in result.rows] == pytest.approx([0.0, 0.5, 0.8], abs=0.03)
    assert {row.status for row in result.rows} == {"measured"}
    assert not result.failed

    assert len(result.samples) == 3 * 3
    assert all(len(sample.decode_seconds) == 3 for sample in result.samples)
    # Each round has all of them, and each of them has its turn at each place.
    assert {(sample.round, sample.name) for sample in result.samples} == {(at, n) for at in range(3) for n in names}
    assert {(sample.turn, sample.name) for sample in result.samples} == {(at, n) for at in range(3) for n in names}

    by_round = {(sample.name, sample.round): sample for sample in result.samples}
    for row in result.rows[1:]:
        pairs = [(by_round["llama-0", at], by_round[row.name, at]) for at in range(3)]
        prefill = [base.prefill_seconds / own.prefill_seconds for base, own in pairs]
        decode = [statistics.median(base.decode_seconds) / statistics.median(own.decode_seconds) for base, own in pairs]
        for phase, ratios in (("prefill", prefill), ("decode", decode)):
            speedup = row.phase(phase).speedup
            assert speedup is not None
            assert speedup.median == pytest.approx(statistics.median(ratios))
            assert min(ratios) <= speedup.low <= speedup.median <= speedup.high <= max(ratios)
        assert row.decode_limit == pytest.approx(decode_limit(load_artifact(Path(row.folder)), load_artifact(dense)))
        assert row.load_seconds is not None
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes > 20e6  # an interpreter with the engine in it
        assert row.artifact_bytes == sum(path.stat().st_size for path in Path(row.folder).iterdir())
    base = result.rows[0]
    assert base.phase("decode").speedup is None
    assert base.decode_limit == 1.0
    assert base.phase("prefill").tokens_per_second == pytest.approx(1e4 / base.phase("prefill").ms.median)
    assert base.phase("total").tokens_per_second == pytest.approx(4e3 / base.phase("total").ms.median)
    whole = [
        sample.prefill_seconds + sum(sample.decode_seconds) for sample in result.samples if sample.name == names[0]
    ]
    assert base.phase("total").ms.median == pytest.approx(1e3 * statistics.median(whole))
    assert base.read_ms == pytest.approx(base.weight_bytes / result.bandwidth[1].best / 1e6)
    assert (result.options.cores, result.prompt_chunks, result.bandwidth[1].threads) == ((1,), {10: 4}, 1)
    assert result.runtime["llama-80"]["versions"]["deepsparse"] == "1.8.0"
    assert any("3 rounds are too few" in note for note in result.notes)


@pytest.mark.slow
def test_one_that_crashes_in_the_middle(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is killed between two rounds, as the system would when memory runs out."""
    measure = WorkerModel.measure
    calls: dict[WorkerModel, int] = {}

    def measure_or_die(self: WorkerModel, *arguments: Any) -> Timing:
        calls[self] = calls.get(self, 0) + 1
        if list(calls).index(self) == 1 and calls[self] == 3:  # the second of the first round, in the third
            self._worker._process.kill()
        return measure(self, *arguments)

    monkeypatch.setattr(WorkerModel, "measure", measure_or_die)
    result = benchmark(
        folders[1:],
        BenchmarkOptions(
            baseline=str(folders[0]), cores=(1,), prompt_lengths=(8,), decode_tokens=2, rounds=5, warmup_rounds=0
        ),
    )
    status = {row.name: (row.status, row.reason) for row in result.rows}
    assert status["llama-50"][0] == "failed"
    assert "was ended by SIGKILL" in str(status["llama-50"][1])
    assert status["llama-0"] == status["llama-80"] == ("measured", None)
    count = {name: sum(sample.name == name for sample in result.samples) for name in status}
    assert count == {"llama-0": 5, "llama-50": 2, "llama-80": 5}
    assert any(note.startswith("llama-50: deepsparse was ended by SIGKILL") for note in result.notes)
    assert [noise.setting for noise in result.noise] == [Setting(1, 8, 1)]
    assert "llama-80" in benchmark_page(result.to_json())


@pytest.mark.slow
def test_profile_is_by_layer(folders: list[Path]) -> None:
    """The engine's times beside the zeros that were put into each layer."""
    result = benchmark(
        [folders[2]],
        BenchmarkOptions(
            baseline=str(folders[0]),
            cores=(1,),
            prompt_lengths=(8,),
            decode_tokens=2,
            rounds=1,
            warmup_rounds=0,
            profile=True,
        ),
    )
    assert [(one.name, one.phase, one.reason) for one in result.profiles] == [
        ("llama-0", "prefill", None),
        ("llama-0", "decode", None),
        ("llama-80", "prefill", None),
        ("llama-80", "decode", None),
    ]
    artifact = load_artifact(folders[2])
    sparse = result.profiles[3]
    assert [part.part for part in sparse.parts] == [*map(str, range(artifact.shapes.layers)), "outside"]
    assert sum(part.weights for part in sparse.parts[:-1]) == artifact.sparsity.weights
    assert sum(part.zeros for part in sparse.parts[:-1]) == artifact.sparsity.zeros
    assert all(part.linears == 7 for part in sparse.parts[:-1])
    assert sparse.total_ms == pytest.approx(sum(part.ms for part in sparse.parts))
    assert sparse.total_ms == pytest.approx(sum(kind.ms for kind in sparse.kinds))
    assert "1 token after 8" in sparse.what
    page = benchmark_page(result.to_json())
    assert "Time by layer, decode" in page
    assert "outside the layers" in page
