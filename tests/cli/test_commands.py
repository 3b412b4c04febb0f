"""The commands on good input: what they print, for people and for machines."""

import json
from collections.abc import Callable
from pathlib import Path

from sparsedeploy.registry import PRUNERS
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]


def test_prune_inspect_eval(cli: Cli, model: Path, text: Path) -> None:
    output = model.parent / "sparse"
    data = ("--data", text, "-n", 2, "--calibration-length", 32)
    pruned = cli("prune", model, "-o", output, "-s", 0.7, "-m", "sparsegpt", "-a", "owl", *data, "--json", "--quiet")
    assert pruned.code == 0
    assert pruned.err == ""
    summary = json.loads(pruned.out)
    assert summary["method"] == "sparsegpt"
    assert abs(summary["achieved"] - 0.7) < 0.005
    shown = cli("inspect", output, "--quiet")
    assert shown.code == 0
    assert "1.mlp.down_proj" in shown.out
    assert "the folder matches its manifest" in shown.out
    assert json.loads(cli("inspect", output, "--json", "--quiet").out)["problems"] == []
    scored = cli("eval", output, "-d", text, "--context", 64, "--json", "--quiet")
    assert json.loads(scored.out)["context"] == 64


def test_inspect_fails_on_a_tampered_folder(cli: Cli, model: Path, text: Path) -> None:
    output = model.parent / "sparse"
    assert cli("prune", model, "-o", output, "-s", 0.5, "-m", "magnitude", "--quiet").code == 0
    (output / "config.json").write_text((output / "config.json").read_text() + " ")
    outcome = cli("inspect", output, "--quiet")
    assert outcome.code == 2
    assert "file config.json was changed after it was written" in outcome.err


def test_magnitude_needs_no_data(cli: Cli, model: Path) -> None:
    outcome = cli("prune", model, "-o", model.parent / "sparse", "-s", 0.5, "-m", "magnitude", "--json", "--quiet")
    assert json.loads(outcome.out)["calibration"] is None


def test_help_teaches_the_field_in_one_screen(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    for word in ("prune", "eval", "inspect", *PRUNERS.names(), "owl", "2:4"):
        assert word in outcome.out.lower()
    assert len(outcome.out.splitlines()) <= 60
    assert cli("--version").out.startswith("sparsedeploy ")
