"""The whole pipeline with the real engine, as the demo runs it, on the tiny reference model."""

import json
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.reporting.report import summary_markdown, summary_table
from sparsedeploy.workflows.demo import _commands, demo
from sparsedeploy.workflows.options import DemoOptions, PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import save_model

OPTIONS = DemoOptions(preset="tiny", sparsities=(0.5, 0.8), samples=16, prompt_length=32, decode_tokens=4, rounds=2)


class Page(HTMLParser):
    """Collects tags and refuses what a self-contained page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "img", "iframe")
        assert not any(name in ("src", "href") for name, _ in attributes)
        self.tags.append(tag)


@pytest.mark.engine
@pytest.mark.slow
def test_demo_with_tasks(deepsparse_runtime: object, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    asked = replace(OPTIONS, sparsities=(0.5,), tasks=("python_lines",))
    report = demo(tmp_path / "out", asked)
    for model in report["models"]:
        assert 0 <= model["quality"]["tasks"]["python_lines"]["acc"] <= 1
        assert model["commands"]["eval"].endswith(" --tasks python_lines")
    assert "python_lines" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.engine
def test_demo(deepsparse_runtime: object, tmp_path: Path) -> None:
    report = demo(tmp_path / "out", OPTIONS, command="sparsedeploy demo --preset tiny")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    names = [model["name"] for model in report["models"]]
    assert names == ["dense", "sparse-50", "sparse-80"]
    dense, half, most = (model["quality"]["perplexity"] for model in report["models"])
    assert dense < half < most
    for name, sparsity in (("sparse-50", 0.5), ("sparse-80", 0.8)):
        inspection = inspect_checkpoint(tmp_path / "out" / "checkpoints" / name)
        assert inspection.problems == []
        assert inspection.sparsity == pytest.approx(sparsity, abs=1e-3)
    rows = report["benchmark"]["rows"]
    assert [row["baseline"] for row in rows] == [True, False, False]
    assert len(report["benchmark"]["samples"]) == 3 * OPTIONS.rounds
    assert all(row["decode"]["speedup"]["median"] > 0 for row in rows[1:])
    table = Console(width=80, record=True)
    table.print(summary_table(report))
    assert all(len(line) <= 80 for line in table.export_text().splitlines())
    assert summary_markdown(report).count("\n") == 5
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    # Perplexity against speed, speedups, perplexity and sparsity, layers; summary, speed, perplexity, sizes, settings,
    # environment.
    assert page.tags.count("figure") == 4
    assert page.tags.count("table") == 6
    assert [list(model["commands"]) for model in report["models"]][1] == ["prune", "eval", "export"]
    # A second run keeps what is there and measures anew.
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    demo(tmp_path / "out", OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == made


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsity 1\.5 is outside"):
        demo(tmp_path / "out", DemoOptions(sparsities=(1.5,)))
    with pytest.raises(UserError, match="given twice"):
        demo(tmp_path / "out", DemoOptions(sparsities=(0.5, 0.5)))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        demo(tmp_path / "file", DemoOptions())
    assert not (tmp_path / "out").exists()


def test_commands_to_repeat_survive_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with $words"
    save_model(folder / "dense")
    checkpoint, artifact = folder / "sparse", folder / "artifact"
    prune(str(folder / "dense"), checkpoint, PruneOptions(sparsity=0.5, method="magnitude"))
    steps = _commands(folder / "dense", checkpoint, artifact, 0.5, replace(OPTIONS, method="magnitude"))
    words = {step: shlex.split(line) for step, line in steps.items()}
    assert str(folder / "dense") in words["prune"]
    assert "--data" not in words["prune"], "magnitude reads no text"
    assert words["export"][-1] == str(artifact)
    assert all(str(checkpoint) in line for line in words.values())
