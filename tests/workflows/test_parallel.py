"""Several processes on one pruning job (torchrun, gloo): the same result as one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.processes import Processes
from sparsedeploy.pruning.layers import assign
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import random_model, save_model


def run(processes: int, *arguments: object, place: Path | None = None) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "sparsedeploy", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=place)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_two_processes_give_what_one_gives(accumulate: str, tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "dense")
    base = ("prune", source, "-s", 0.6, "-m", "sparsegpt", "-a", "owl", "--accumulate", accumulate)
    data = ("--data", text, "-n", 5, "--calibration-length", 32, "--device", "cpu")
    weights = []
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        outcome = run(processes, *base, *data, "-o", output)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.count("modules' weights are zero") == 1
        assert inspect_checkpoint(output).problems == []
        weights.append(load_file(output / "model.safetensors"))
    one, two = weights
    if accumulate == "float64":
        assert all(torch.equal(one[name], two[name]) for name in one)
    # In float32 the sums differ in their last bits: a few near-ties may fall the other way.
    different = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    assert different <= 1e-3 * sum(tensor.numel() for tensor in one.values())


@pytest.mark.slow
def test_bad_input_is_one_line_from_all_processes_together(tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "dense")
    arguments = ("prune", source, "-s", 0.6, "--data", text, "-n", 1, "--calibration-length", 32, "--device", "cpu")
    outcome = run(2, *arguments, "-o", tmp_path / "out")
    assert outcome.returncode != 0
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: 1 calibration sequences cannot be split over 2 processes. Use more --samples or fewer processes."
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "prune dense -o out -s 0.5 -m magnitude --recover lora --train-data text.txt",
        "recover dense -o out --train-data text.txt",
        "eval dense -d text.txt",
        "runtime list",
    ],
)
def test_two_processes_refuse_what_they_cannot_share(command: str, tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "dense")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    outcome = run(2, *command.split(), place=tmp_path)
    assert outcome.returncode != 0
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "2 processes cannot share" in lines[0]
    assert outcome.stdout == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_linears_with_one_input_go_to_one_process() -> None:
    driver = LayerDriver(random_model("llama"), torch.zeros(1, 8, dtype=torch.int64))
    layer = next(iter(driver.iterate("sum_squares", changes_weights=False)))
    owners = {name.rpartition(".")[2]: owner for name, owner in assign(layer, 2).items()}
    assert owners["q_proj"] == owners["k_proj"] == owners["v_proj"]
    assert owners["gate_proj"] == owners["up_proj"] != owners["down_proj"]
    assert set(assign(layer, 1).values()) == {0}


def test_sequences_are_split_without_loss() -> None:
    tokens = torch.arange(14).reshape(7, 2)
    allocated = [Processes(index, 3).shard(tokens) for index in range(3)]
    assert torch.equal(torch.cat(allocated), tokens)
    with pytest.raises(UserError, match="2 calibration sequences cannot be split over 3"):
        Processes(0, 3).shard(tokens[:2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["elsa", "sparse-lora"])
def test_two_processes_train_as_one(method: str, tmp_path: Path, text: Path) -> None:
    """Three passes a step, so that one process has more of them than the other; the dense model is learnt from too."""
    source, pruned = save_model(tmp_path / "dense"), tmp_path / "pruned"
    prune(str(source), pruned, PruneOptions(sparsity=0.6, method="magnitude"), RunOptions(device="cpu"))
    options = ("--train-option", "accumulation=3", "--train-option", "batch_size=1", "--train-samples", 25)
    weights, reports = [], []
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        outcome = run(
            processes, "recover", pruned, "-o", output, "-m", method, "--loss", "both", "--train-data", text,
            "--train-length", 32, *options, "--device", "cpu", "--json",
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr
        assert inspect_checkpoint(output).problems == []
        weights.append(load_file(output / "model.safetensors"))
        reports.append(json.loads(outcome.stdout)["recovery"]["report"])
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["last_loss"] == pytest.approx(reports[1]["last_loss"], rel=1e-4)
    one, two = weights
    before = load_file(pruned / "model.safetensors")
    assert any(not torch.equal(one[name], before[name]) for name in one)
    # The sums of gradients differ in their last bits, which Adam may carry on where a gradient is almost zero.
    for name, value in one.items():
        close = torch.isclose(value, two[name], rtol=1e-3, atol=2e-5)
        assert close.float().mean() > 0.99
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_more_processes_than_passes_are_refused(tmp_path: Path, text: Path) -> None:
    source, pruned = save_model(tmp_path / "dense"), tmp_path / "pruned"
    prune(str(source), pruned, PruneOptions(sparsity=0.6, method="magnitude"), RunOptions(device="cpu"))
    outcome = run(
        2, "recover", pruned, "-o", tmp_path / "out", "-m", "elsa", "--train-data", text, "--device", "cpu",
        "--train-option", "accumulation=1",
    )  # fmt: skip
    assert outcome.returncode != 0
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: 2 processes cannot share the 1 passes of a step. Use --train-option accumulation=2, or fewer processes."
    ]
    assert not (tmp_path / "out").exists()
