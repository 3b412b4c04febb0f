"""A benchmark on the real engine: what it records, not how fast it was."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from sparsedeploy.cli.bench import bench_command
from sparsedeploy.evaluation.benchmark import benchmark
from sparsedeploy.evaluation.byte_limit import decode_limit
from sparsedeploy.export.artifact import load_artifact
from sparsedeploy.reporting.benchmark_table import benchmark_heading, benchmark_markdown, benchmark_tables
from tests.runtimes.exported import export_small

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("deepsparse_runtime")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bench")
    return [export_small(root / str(sparsity), "llama", sparsity).folder for sparsity in (0.0, 0.5, 0.8)]


def test_result_holds_every_sample_and_follows_from_them(folders: list[Path]) -> None:
    dense, half, most = folders
    result = benchmark(
        [half, most], dense, cores=1, prompt_length=10, decode_tokens=3, rounds=3, warmup_rounds=1, chunk=4
    )
    names = ["llama-0", "llama-50", "llama-80"]
    assert [row.name for row in result.rows] == names
    assert [row.baseline for row in result.rows] == [True, False, False]
    assert [row.sparsity for row in result.rows] == pytest.approx([0.0, 0.5, 0.8], abs=0.03)

    assert len(result.samples) == 3 * 3
    assert all(len(sample.decode_seconds) == 3 for sample in result.samples)
    # Each round has all of them, and each of them has its turn at each place.
    assert {(sample.round, sample.artifact) for sample in result.samples} == {(at, n) for at in range(3) for n in names}
    assert {(sample.turn, sample.artifact) for sample in result.samples} == {(at, n) for at in range(3) for n in names}

    by_round = {(sample.artifact, sample.round): sample for sample in result.samples}
    for row in result.rows[1:]:
        pairs = [(by_round["llama-0", at], by_round[row.name, at]) for at in range(3)]
        prefill = [base.prefill_seconds / own.prefill_seconds for base, own in pairs]
        decode = [statistics.median(base.decode_seconds) / statistics.median(own.decode_seconds) for base, own in pairs]
        assert row.prefill_speedup is not None
        assert row.decode_speedup is not None
        assert row.prefill_speedup.median == pytest.approx(statistics.median(prefill))
        assert row.decode_speedup.median == pytest.approx(statistics.median(decode))
        assert row.decode_limit == pytest.approx(decode_limit(load_artifact(Path(row.folder)), load_artifact(dense)))
    base = result.rows[0]
    assert (base.prefill_speedup, base.decode_speedup, base.decode_limit) == (None, None, 1.0)
    assert base.prefill_tokens_per_second == pytest.approx(1e4 / base.prefill_ms.median)
    assert base.decode_tokens_per_second == pytest.approx(1e3 / base.decode_ms.median)
    assert base.read_ms == pytest.approx(base.weight_bytes / result.bandwidth.best / 1e6)

    assert (result.options.cores, result.options.prompt_chunk, result.bandwidth.threads) == (1, 4, 1)
    assert result.runtime["llama-80"]["versions"]["deepsparse"] == "1.8.0"
    assert result.runtime["llama-80"]["cores"] == 1
    assert any("3 rounds are too few" in note for note in result.notes)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["samples"][0]["artifact"] in names

    printed = io.StringIO()
    for table in benchmark_tables(result):
        Console(width=100, file=printed).print(table)
    for shown in (printed.getvalue(), benchmark_markdown(result)):
        assert all(name in shown for name in names)
        assert f"{result.rows[1].decode_speedup.median:.2f}x" in shown
        assert f"{result.rows[2].decode_limit:.2f}x" in shown
    assert "1 core of" in benchmark_heading(result)


def test_command_writes_what_it_prints(folders: list[Path], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(bench_command)
    output = tmp_path / "results" / "bench.json"
    arguments = [str(folders[2]), "--baseline", str(folders[0]), "--runtime", "deepsparse", "--cores", "1"]
    lengths = ["--prompt-length", "8", "--decode-tokens", "2", "--rounds", "2", "--warmup", "0"]
    done = CliRunner().invoke(app, [*arguments, *lengths, "-o", str(output), "--json"], catch_exceptions=False)
    printed = json.loads(done.stdout)
    assert printed == json.loads(output.read_text())
    assert printed["options"]["artifacts"] == [str(folders[2])]
    assert printed["machine"]["cores"] >= 1
