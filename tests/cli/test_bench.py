"""``sparsedeploy bench`` as a user runs it: every output, mixed runtimes, failures, and comparing results."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsedeploy.progress import SafeConsole
from sparsedeploy.reporting.benchmark_page import repeat_command
from sparsedeploy.reporting.benchmark_table import benchmark_heading, benchmark_markdown, benchmark_tables
from sparsedeploy.speed.comparison import compare_results, parse_result, parse_threshold
from tests.cli.conftest import Outcome
from tests.reporting.results import bench_result
from tests.runtimes.artifacts import describe, refresh, write_folder
from tests.runtimes.exported import export_small


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bench")
    return [export_small(root / str(sparsity), "llama", sparsity).folder for sparsity in (0.0, 0.5, 0.8)]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_mixed_runtimes_settings_and_every_output(
    cli: Callable[..., Outcome], folders: list[Path], tmp_path: Path
) -> None:
    """DeepSparse and PyTorch in one run, two lengths and batch sizes; DeepSparse's batch is a row that says why not."""
    checkpoint = folders[0].parent / "checkpoint"
    files = {name: tmp_path / "results" / f"bench.{name}" for name in ("json", "csv", "html")}
    lengths = ("--prompt-length", "6,9", "--decode-tokens", 2, "--rounds", 2, "--warmup", 0, "--batch", "1,2")
    outputs = ("-o", files["json"], "--csv", files["csv"], "--html", files["html"])
    done = cli(
        "bench",
        folders[2],
        f"torch={checkpoint}",
        "--baseline",
        folders[0],
        "-c",
        1,
        *lengths,
        *outputs,
        "--json",
        "-q",
    )
    assert done.code == 0
    result = json.loads(done.out)
    assert result == json.loads(files["json"].read_text())
    seen = {}
    for row in result["rows"]:
        seen[row["name"], row["setting"]["prompt_length"], row["setting"]["batch"]] = row
        assert row["setting"]["cores"] == 1
    assert len(seen) == len(result["rows"]) == 3 * 2 * 2
    for (name, _, batch), row in seen.items():
        if batch == 2 and name != "checkpoint":
            assert (row["status"], row["reason"]) == ("unsupported", "DeepSparse runs one sequence at once")
        else:
            assert row["status"] == "measured"
    both = seen["checkpoint", 6, 2]
    assert both["runtime"] == "torch"
    assert both["total"]["speedup"] is None
    assert both["prefill"]["tokens_per_second"] == pytest.approx(12e3 / both["prefill"]["ms"]["median"])
    assert len(result["samples"]) == 2 * (2 * 3 + 2 * 1)

    lines = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert len(lines) == 12
    assert float(lines[1]["decode_ms_median"]) == result["rows"][1]["decode"]["ms"]["median"]
    printed = io.StringIO()
    console = Console(width=80, file=printed)
    for table in benchmark_tables(result):
        console.print(table)
    assert max(map(len, printed.getvalue().splitlines())) <= 80
    for shown in (printed.getvalue(), benchmark_markdown(result), files["html"].read_text()):
        assert all(name in shown for name in ("llama-0", "llama-80", "checkpoint", "unsupported"))
        assert f"{result['rows'][1]['decode']['speedup']['median']:.2f}x" in shown
        assert f"{result['rows'][1]['decode_limit']:.2f}x" in shown
    assert "deepsparse 1.8.0" in benchmark_heading(result)
    # The command on the page is the one that was run.
    assert repeat_command(result).startswith(
        f"sparsedeploy bench {folders[2]} torch={checkpoint} --baseline {folders[0]}"
    )
    assert "--prompt-length 6,9 --batch 1,2 --decode-tokens 2" in repeat_command(result)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("deepsparse_runtime")
def test_one_that_fails_is_a_row_and_the_others_go_on(
    cli: Callable[..., Outcome], folders: list[Path], tmp_path: Path
) -> None:
    """A graph that the engine cannot read: its hashes are right, loading fails."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders[1].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.onnx").write_bytes(b"no graph")
    refresh(broken)
    lengths = ("-c", 1, "--prompt-length", 8, "--decode-tokens", 2, "--rounds", 2, "--warmup", 0)
    done = cli("bench", broken, folders[2], "--baseline", folders[0], *lengths, "--json", "-q")
    assert done.code == 0
    rows = {row["name"]: row for row in json.loads(done.out)["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "llama-0": "measured",
        "broken": "failed",
        "llama-80": "measured",
    }
    assert rows["broken"]["reason"].startswith("deepsparse")
    assert "\n" not in rows["broken"]["reason"]
    assert rows["llama-80"]["decode"]["speedup"]["median"] > 0
    # Alone it leaves nothing to compare; as the baseline it takes the comparison away.
    assert cli("bench", broken, "--baseline", folders[0], *lengths, "-q").code == 1
    without = cli("bench", folders[2], "--baseline", broken, *lengths, "--json", "-q")
    assert without.code == 1
    rows = {row["name"]: row for row in json.loads(without.out)["rows"]}
    assert rows["llama-80"]["decode"]["ms"]["median"] > 0
    assert rows["llama-80"]["decode"]["speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "there is no baseline"),
        (["--baseline", "a"], "nothing to compare with the baseline"),
        (["a", "--baseline", "b", "--prompt-length", "12;8"], "--prompt-length is '12;8'"),
        (["a", "--baseline", "b", "--cores", "all"], "--cores is 'all'"),
        (["a", "--baseline", "b"], "is not an exported artifact"),
        (["--compare", "missing.json", "missing.json"], "cannot read missing.json"),
        (["a", "--baseline", "b", "--compare", "old.json", "new.json"], "--compare measures nothing"),
    ],
)
def test_refusals(cli: Callable[..., Outcome], arguments: list[str], words: str) -> None:
    done = cli("bench", *arguments, "-q")
    assert done.code == 2
    assert words in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (None, "target", "onnxruntime"),
        ("engine", "version", "9.9.9"),
        ("shapes", "hidden", 20),
        ("sparsity", "zeros", 900),
        (None, "mine", "a note"),
    ],
)
def test_an_edited_description_is_refused_by_every_command(
    cli: Callable[..., Outcome],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    place: str | None,
    key: str,
    value: Any,
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    dense, sparse = write_folder(tmp_path / "dense", describe()), write_folder(tmp_path / "sparse", describe(zeros=500))
    path = sparse / "artifact.json"
    values = json.loads(path.read_text())
    (values if place is None else values[place])[key] = value
    path.write_text(json.dumps(values))
    for command in (
        ("bench", sparse, "--baseline", dense),
        ("bench", dense, "--baseline", f"torch={sparse}"),
        ("generate", sparse, "some text"),
        ("serve", sparse, "--port", 0),
        ("push", sparse, "me/model"),
    ):
        done = cli(*command, "-q")
        assert done.code == 2, command
        assert done.err.count("\n") == 1, done.err
        assert "artifact.json was edited or is damaged" in done.err
        assert done.changed == []


def change(result: dict[str, Any], name: str, factor: float, rounds: int = 10**9) -> dict[str, Any]:
    """The same result with one candidate's decoding slower in the first rounds."""
    changed = copy.deepcopy(result)
    for sample in changed["samples"]:
        if sample["name"] == name and sample["round"] < rounds:
            sample["decode_seconds"] = [factor * value for value in sample["decode_seconds"]]
    for row in changed["rows"]:
        if row["name"] == name:
            row["decode"]["ms"]["median"] *= factor
    return changed


def compare(cli: Callable[..., Outcome], folder: Path, old: Any, new: Any, *more: str) -> Outcome:
    for name, values in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return cli("bench", "--compare", folder / "old.json", folder / "new.json", *more, "-q")


def test_compare_finds_a_regression_beyond_the_threshold(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    old = bench_result()
    same = compare(cli, tmp_path, old, old)
    assert same.code == 0
    assert "no regression beyond 5.0%" in same.out
    slower = change(old, "sparse-80", 1.2)
    done = compare(cli, tmp_path, old, slower)
    assert done.code == 1
    assert "+20.0%" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert compare(cli, tmp_path, old, slower, "--threshold", "25%").code == 0
    as_json = compare(cli, tmp_path, old, slower, "--json")
    values = json.loads(as_json.out)
    assert as_json.code == 1
    assert values["regressed"] is True
    verdicts = {(one["name"], one["what"]): one["verdict"] for one in values["changes"]}
    assert verdicts["sparse-80", "decode"] == "worse"
    assert verdicts["dense", "decode"] == verdicts["sparse-80", "prefill"] == "same"
    assert compare(cli, tmp_path, slower, old).code == 0
    assert "better" in compare(cli, tmp_path, slower, old).out


def test_titles_are_printed_without_tags(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    values = bench_result()
    assert "[bold]" not in compare(cli, tmp_path, values, values).out
    printed = io.StringIO()
    console = SafeConsole(width=80, file=printed, markup=False)
    for table in benchmark_tables(values):
        console.print(table)
    assert "prefill" in printed.getvalue()
    assert "[bold]" not in printed.getvalue()


def test_compare_is_not_sure_of_what_the_interval_leaves_open() -> None:
    """The median grew, but only by rounds that may be chance: half of them are as before."""
    old = bench_result(rounds=8)
    new = change(old, "sparse-80", 1.2, rounds=4)
    comparison = compare_results(parse_result(old, "old"), parse_result(new, "new"), 0.05)
    decode = next(one for one in comparison.changes if (one.name, one.what) == ("sparse-80", "decode"))
    assert decode.verdict == "unsure"
    assert comparison.regressions == []


def test_compare_counts_a_new_failure_and_a_larger_folder(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    old = bench_result()
    failed = copy.deepcopy(old)
    failed["rows"][1].update(status="failed", reason="it fell", prefill=None, decode=None, total=None)
    done = compare(cli, tmp_path, old, failed)
    assert done.code == 1
    assert "fails" in done.out
    larger = copy.deepcopy(old)
    larger["rows"][1]["artifact_bytes"] *= 2
    done = compare(cli, tmp_path, old, larger)
    assert done.code == 1
    assert "+100.0%" in done.out


def test_compare_of_results_that_do_not_match(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    old = bench_result()
    other = copy.deepcopy(old)
    for one in (*other["rows"], *other["samples"]):
        one["setting"]["prompt_length"] += 1
    assert "no row in common" in compare(cli, tmp_path, old, other).err
    assert "format 2" in compare(cli, tmp_path, old, {"format": 1}).err
    assert compare(cli, tmp_path, old, {"format": 1}).code == 2
    elsewhere = copy.deepcopy(old)
    elsewhere["machine"]["processor"] = "another"
    assert "The processors differ" in compare(cli, tmp_path, old, elsewhere).out


def test_thresholds() -> None:
    assert parse_threshold("5%") == parse_threshold("0.05") == 0.05
    for text in ("much", "-1%", "nan%"):
        with pytest.raises(Exception, match="the threshold is"):
            parse_threshold(text)
